/* hsa.Sample on a GPU: a thread block for each row of logits. */
#include <cuda_runtime.h>

#include "library.h"
#include "sample.h"

namespace {

constexpr int kThreads = 512;

struct Block {
  uint64_t* bins;
  uint64_t* parts; /* one a thread */
  int64_t& found;

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void add(uint64_t* sum, uint64_t x) const { atomicAdd((unsigned long long*)sum, (unsigned long long)x); }

  /* What `combine` makes of all up to this one, by doubling steps; the last has all. */
  template <typename Combine>
  __device__ uint64_t upto(uint64_t x, Combine combine) const {
    __syncthreads();
    parts[threadIdx.x] = x;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const bool takes = int(threadIdx.x) >= step;
      const uint64_t other = takes ? parts[threadIdx.x - step] : 0;
      __syncthreads();
      if (takes) parts[threadIdx.x] = x = combine(x, other);
      __syncthreads();
    }
    return x;
  }
  __device__ uint64_t most(uint64_t x) const {
    upto(x, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    return parts[kThreads - 1];
  }
  __device__ uint64_t before(uint64_t x) const {
    return upto(x, [](uint64_t a, uint64_t b) { return a + b; }) - x;
  }
  __device__ uint64_t sum(uint64_t x) const {
    before(x);
    return parts[kThreads - 1];
  }
};

__global__ void sample(const float* logits, const float* temperature, const float* top_p, const float* uniform, int64_t* token,
                       int64_t w, int64_t V) {
  __shared__ uint64_t bins[hsa::kBins];
  __shared__ uint64_t parts[kThreads];
  __shared__ int64_t found;
  Block block{bins, parts, found};
  const int64_t row = blockIdx.x, b = row / w;
  const int64_t chosen = hsa::choose(block, logits + row * V, V, temperature[b], top_p[b], uniform[b]);
  if (threadIdx.x == 0) token[row] = chosen;
}

}  // namespace

int32_t hsa_gpu_sample(void* const* tensors, const int64_t* dims, void* stream) {
  int64_t w = dims[1], V = dims[2];
  void* pointers[] = {(void*)&tensors[0], (void*)&tensors[1], (void*)&tensors[2], (void*)&tensors[3], (void*)&tensors[4], &w, &V};
  return cudaLaunchKernel((const void*)sample, dim3(dims[0] * w), dim3(kThreads), pointers, 0, (cudaStream_t)stream);
}
