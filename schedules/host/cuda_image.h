/* Kernels as nvcc's cubins, embedded in a library: loaded when the first is launched, for all devices. */
#ifndef HSA_CUDA_IMAGE_H
#define HSA_CUDA_IMAGE_H

#include <cuda_runtime.h>

#include <mutex>

struct hsa_image {
  const void* code;
  cudaLibrary_t library = nullptr;
};

struct hsa_embedded {
  hsa_image* image;
  const char* name;
  cudaKernel_t kernel = nullptr;
};

/* Dynamic shared memory that a kernel may have without asking for more: 48 KiB less its static part, the barriers. */
enum { HSA_PLAIN_SHARED_BYTES = 40 * 1024 };

static inline cudaError_t hsa_load(hsa_embedded& embedded) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> guard(mutex);
  cudaError_t error = cudaSuccess;
  if (!embedded.image->library)
    error = cudaLibraryLoadData(&embedded.image->library, embedded.image->code, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (error == cudaSuccess && !embedded.kernel)
    error = cudaLibraryGetKernel(&embedded.kernel, embedded.image->library, embedded.name);
  return error;
}

/* A kernel is looked up once, and its shared memory allowed at each launch, as that is by device. */
static inline int hsa_launch(hsa_embedded& embedded, dim3 grid, dim3 block, void** arguments, int shared_bytes,
                             cudaStream_t stream) {
  if (const cudaError_t error = hsa_load(embedded); error != cudaSuccess) return error;
  const void* kernel = (const void*)embedded.kernel;
  if (shared_bytes > HSA_PLAIN_SHARED_BYTES) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

#endif
