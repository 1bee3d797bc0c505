/* The C interface of a compiled GPU kernel: raw device pointers, sizes and a stream. It needs the CUDA driver and no
 * compiler, no Python and no runtime library; it loads on machines without a GPU.
 *
 * run() enqueues all launches on the stream of the current device and returns at once; nothing waits for the device.
 * Tensors are contiguous and aligned to 16 bytes, inputs first, in the order of kernel.h; dims are B, L, C. Scratch is
 * device memory that the host gives, of scratch_bytes(dims) bytes aligned to 256 (any device pointer if that is 0), in
 * use until the stream has passed the launches.
 */
#ifndef HSA_CUDA_KERNEL_H
#define HSA_CUDA_KERNEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HSA_CUDA_KERNEL_ABI 1

typedef struct hsa_cuda_kernel {
  int32_t abi;         /* HSA_CUDA_KERNEL_ABI of the build */
  const char* problem; /* the operator's static description, as JSON with sorted keys */
  const char* pass;    /* "forward" or "backward" */
  int32_t tensors;     /* how many pointers run() takes */
  int64_t (*scratch_bytes)(const int64_t* dims);
  int32_t (*run)(void* const* tensors, const int64_t* dims, void* scratch, void* stream); /* 0 or an error */
  const char* (*message)(int32_t error);
} hsa_cuda_kernel;

#ifdef __cplusplus
}
#endif
#endif
