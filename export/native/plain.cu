/* The operators in plain CUDA C++, for any sizes and types: what serves a problem that no compiled kernel was built for
 * (float32, widths that matrix instructions do not take). A thread block computes one query row; correct, not fast.
 *
 * Values that a GPU call cannot check without waiting for the device are clamped: a chunk outside of the memory counts as
 * an empty slot, a length above L as L.
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include "library.h"

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int64_t kShared = 48 << 10;

template <typename Combine>
__device__ float across_block(float x, Combine combine) {
  __shared__ float of_warp[kWarps];
  for (int step = 16; step; step /= 2) x = combine(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads(); /* others may still read what the last call left */
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warp[0];
  for (int i = 1; i < kWarps; ++i) x = combine(x, of_warp[i]);
  return x;
}

__device__ float block_max(float x) {
  return across_block(x, [](float a, float b) { return fmaxf(a, b); });
}

__device__ float block_sum(float x) {
  return across_block(x, [](float a, float b) { return a + b; });
}

template <typename T>
__device__ float dot(const float* q, const T* k, int64_t D) {
  float sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += q[d] * float(k[d]);
  return sum;
}

template <typename T>
__device__ void load(float* q, const T* row, int64_t D, float scale) {
  for (int64_t d = threadIdx.x; d < D; d += kThreads) q[d] = float(row[d]) * scale;
}

/* ---------------------------------------------------------------------------------------------------- chunk selection */

struct SelectSizes {
  int64_t L, C, Hkv, Hr, Dr, S, K, lag;
};

/* A block for each token and retrieval head. Chunks are scored newest first, a thread each; what beats the K-th best goes
 * into the list, kept by falling score, where an older chunk stays behind a newer one that it ties with. */
template <typename T>
__global__ void select(const T* q_r, const T* landmark, const int64_t* position, const int64_t* chunks, int32_t* indices,
                       float* scores, SelectSizes p) {
  extern __shared__ float shared[];
  float *q = shared, *best = q + p.Dr, *fresh = best + p.K;
  int32_t* place = reinterpret_cast<int32_t*>(fresh + kThreads);
  const int64_t r = blockIdx.x % p.Hr, token = blockIdx.x / p.Hr, b = token / p.L, t = token % p.L;
  const int64_t past = position[b] + t - p.lag, filled = chunks[b] < p.C ? chunks[b] : p.C;
  int64_t visible = past > 0 ? past / p.S : 0;
  if (visible > filled) visible = filled;
  load(q, q_r + (token * p.Hr + r) * p.Dr, p.Dr, 1.0f);
  const float scale = rsqrtf(float(p.Dr)); /* of the sums, so that what ties exactly stays tied */
  for (int64_t k = threadIdx.x; k < p.K; k += kThreads) best[k] = -CUDART_INF_F, place[k] = -1;
  __syncthreads();
  for (int64_t end = visible; end > 0; end -= kThreads) {
    const int64_t c = end - 1 - threadIdx.x;
    const float score = c >= 0 ? dot(q, landmark + ((b * p.C + c) * p.Hr + r) * p.Dr, p.Dr) * scale : -CUDART_INF_F;
    fresh[threadIdx.x] = score;
    if (__syncthreads_or(score > best[p.K - 1]) && threadIdx.x == 0) {
      for (int i = 0; i < kThreads; ++i) {
        int64_t k = p.K - 1;
        if (!(fresh[i] > best[k])) continue;
        for (; k > 0 && best[k - 1] < fresh[i]; --k) best[k] = best[k - 1], place[k] = place[k - 1];
        best[k] = fresh[i], place[k] = int32_t(end - 1 - i);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x) return;
  for (int64_t k = 1; k < p.K; ++k) { /* newest first; empty slots, -1, are last as they are */
    const int32_t c = place[k];
    const float score = best[k];
    int64_t i = k;
    for (; i > 0 && place[i - 1] < c; --i) place[i] = place[i - 1], best[i] = best[i - 1];
    place[i] = c, best[i] = score;
  }
  const int64_t shares = p.Hkv / p.Hr;
  for (int64_t h = r * shares; h < (r + 1) * shares; ++h)
    for (int64_t k = 0; k < p.K; ++k) {
      indices[(token * p.Hkv + h) * p.K + k] = place[k];
      scores[(token * p.Hkv + h) * p.K + k] = place[k] < 0 ? 0.0f : best[k];
    }
}

/* ---------------------------------------------------------------------------------------------------- chunk attention */

struct AttentionSizes {
  int64_t L, C, Hq, Hkv, D, S, K;
  bool off_by_one;
  float scale;
};

/* A block for each query row. */
template <typename T>
__global__ void attend(const T* q_, const T* k, const T* v, const int32_t* indices, const float* weights, T* o, AttentionSizes p) {
  extern __shared__ float shared[];
  float *q = shared, *sums = q + p.D, *e = sums + p.D;
  const int64_t row = blockIdx.x, hq = row % p.Hq, token = row / p.Hq, b = token / p.L, h = hq / (p.Hq / p.Hkv);
  load(q, q_ + row * p.D, p.D, p.scale);
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) sums[d] = 0;
  __syncthreads();
  for (int64_t slot = 0; slot < p.K; ++slot) {
    const int64_t at = (token * p.Hkv + h) * p.K + slot, c = indices[at];
    if (c < 0 || c >= p.C) continue;
    const int64_t first = ((b * p.C + c) * p.S * p.Hkv + h) * p.D, stride = p.Hkv * p.D;
    float peak = p.off_by_one ? 0.0f : -CUDART_INF_F, total = 0;
    for (int64_t s = threadIdx.x; s < p.S; s += kThreads) peak = fmaxf(peak, e[s] = dot(q, k + first + s * stride, p.D));
    peak = block_max(peak);
    for (int64_t s = threadIdx.x; s < p.S; s += kThreads) total += e[s] = expf(e[s] - peak);
    total = block_sum(total) + (p.off_by_one ? expf(-peak) : 0.0f);
    const float factor = weights[at] / total;
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
      float sum = 0;
      for (int64_t s = 0; s < p.S; ++s) sum += e[s] * float(v[first + s * stride + d]);
      sums[d] += sum * factor;
    }
    __syncthreads();
  }
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) o[row * p.D + d] = T(sums[d]);
}

/* ----------------------------------------------------------------------------------------------------- sliding window */

struct WindowSizes {
  int64_t L, C, Hq, Hkv, D, W;
};

/* A block for each query row; keys go by, a thread each, with a softmax that is carried along. A key's place counts from
 * the segment's first token: negative ones lie in the ring. */
template <typename T>
__global__ void window(const T* q_, const T* k, const T* v, const T* past_k, const T* past_v, const int64_t* position,
                       const int64_t* lengths, T* o, WindowSizes p) {
  extern __shared__ float shared[];
  float *q = shared, *sums = q + p.D, *e = sums + p.D;
  const int64_t row = blockIdx.x, hq = row % p.Hq, token = row / p.Hq, b = token / p.L, t = token % p.L;
  const int64_t h = hq / (p.Hq / p.Hkv), start = position[b], stride = p.Hkv * p.D;
  if (t >= lengths[b]) {
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) o[row * p.D + d] = T(0.0f);
    return;
  }
  const auto where = [&](int64_t s, const T* ring, const T* fresh) {
    return (s < 0 ? ring + (b * p.W + (start + s) % p.W) * stride : fresh + (b * p.L + s) * stride) + h * p.D;
  };
  load(q, q_ + row * p.D, p.D, rsqrtf(float(p.D)));
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) sums[d] = 0;
  __syncthreads();
  float peak = -CUDART_INF_F, total = 0;
  const int64_t oldest = t - p.W + 1 > -start ? t - p.W + 1 : -start;
  for (int64_t first = oldest; first <= t; first += kThreads) {
    const int64_t s = first + threadIdx.x, count = t + 1 - first < kThreads ? t + 1 - first : kThreads;
    const float x = s <= t ? dot(q, where(s, past_k, k), p.D) : -CUDART_INF_F;
    const float higher = fmaxf(peak, block_max(x)), factor = expf(peak - higher);
    e[threadIdx.x] = expf(x - higher);
    total = total * factor + block_sum(e[threadIdx.x]);
    peak = higher;
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
      float sum = sums[d] * factor;
      for (int64_t i = 0; i < count; ++i) sum += e[i] * float(where(first + i, past_v, v)[d]);
      sums[d] = sum;
    }
    __syncthreads();
  }
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) o[row * p.D + d] = T(sums[d] / total);
}

/* A block for each of the C newest slots of a row's ring, after all reads of it. */
template <typename T>
__global__ void write_ring(const T* k, const T* v, const T* past_k, const T* past_v, const int64_t* position,
                           const int64_t* lengths, T* present_k, T* present_v, WindowSizes p) {
  const int64_t b = blockIdx.x / p.C, newest = blockIdx.x % p.C, stride = p.Hkv * p.D;
  const int64_t count = lengths[b] < p.L ? lengths[b] : p.L;
  const int64_t slot = (b * p.W + (position[b] + count + p.W - 1 - newest) % p.W) * stride;
  const bool fresh = newest < count;
  const int64_t from = fresh ? (b * p.L + count - 1 - newest) * stride : slot;
  const T *keys = fresh ? k : past_k, *values = fresh ? v : past_v;
  for (int64_t d = threadIdx.x; d < stride; d += kThreads) {
    present_k[slot + d] = keys[from + d];
    present_v[slot + d] = values[from + d];
  }
}

/* --------------------------------------------------------------------------------------------------------- launchers */

template <typename T>
struct Same {
  using type = T;
};

template <typename... P>
int32_t launch(void (*kernel)(P...), int64_t blocks, int64_t bytes, cudaStream_t stream, typename Same<P>::type... arguments) {
  if (blocks == 0) return 0;
  if (bytes > kShared) return cudaErrorInvalidValue;
  void* pointers[] = {(void*)&arguments...};
  return cudaLaunchKernel((const void*)kernel, dim3(blocks), dim3(kThreads), pointers, bytes, stream);
}

template <typename T>
int32_t run_select(const int64_t* x, void* const* tensors, const int64_t* dims, cudaStream_t stream) {
  const SelectSizes p{dims[1], dims[2], x[0], x[1], x[2], x[3], x[4], x[5] ? x[5] - x[3] : 0};
  return launch(select<T>, dims[0] * p.L * p.Hr, 4 * (p.Dr + 2 * p.K + kThreads), stream, (const T*)tensors[0],
                (const T*)tensors[1], (const int64_t*)tensors[2], (const int64_t*)tensors[3], (int32_t*)tensors[4],
                (float*)tensors[5], p);
}

template <typename T>
int32_t run_attention(const int64_t* x, float scale, void* const* tensors, const int64_t* dims, cudaStream_t stream) {
  const float factor = scale ? scale : 1 / sqrtf(float(x[2]));
  const AttentionSizes p{dims[1], dims[2], x[0], x[1], x[2], x[3], x[4], x[5] != 0, factor};
  return launch(attend<T>, dims[0] * p.L * p.Hq, 4 * (2 * p.D + p.S), stream, (const T*)tensors[0], (const T*)tensors[1],
                (const T*)tensors[2], (const int32_t*)tensors[3], (const float*)tensors[4], (T*)tensors[5], p);
}

template <typename T>
int32_t run_window(const int64_t* x, void* const* tensors, const int64_t* dims, cudaStream_t stream) {
  const WindowSizes p{dims[1], dims[2], x[0], x[1], x[2], x[3]};
  const auto q = (const T*)tensors[0], k = (const T*)tensors[1], v = (const T*)tensors[2];
  const auto past_k = (const T*)tensors[3], past_v = (const T*)tensors[4];
  const auto position = (const int64_t*)tensors[5], lengths = (const int64_t*)tensors[6];
  const int32_t error = launch(window<T>, dims[0] * p.L * p.Hq, 4 * (2 * p.D + kThreads), stream, q, k, v, past_k, past_v,
                               position, lengths, (T*)tensors[7], p);
  if (error) return error;
  return launch(write_ring<T>, dims[0] * p.C, 0, stream, k, v, past_k, past_v, position, lengths, (T*)tensors[8],
                (T*)tensors[9], p);
}

template <typename T>
int32_t run(int32_t op, const int64_t* statics, float scale, void* const* tensors, const int64_t* dims, void* stream) {
  if (op == HSA_CHUNK_SELECT) return run_select<T>(statics, tensors, dims, (cudaStream_t)stream);
  if (op == HSA_CHUNK_ATTENTION) return run_attention<T>(statics, scale, tensors, dims, (cudaStream_t)stream);
  return run_window<T>(statics, tensors, dims, (cudaStream_t)stream);
}

}  // namespace

int32_t hsa_plain_run(int32_t op, int32_t dtype, const int64_t* statics, float scale, void* const* tensors,
                      const int64_t* dims, void* stream) {
  if (dtype == HSA_FLOAT32) return run<float>(op, statics, scale, tensors, dims, stream);
  if (dtype == HSA_FLOAT16) return run<__half>(op, statics, scale, tensors, dims, stream);
  return run<__nv_bfloat16>(op, statics, scale, tensors, dims, stream);
}

int32_t hsa_gpu_capability(int32_t* capability) {
  int device = 0, major = 0, minor = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  *capability = 10 * major + minor;
  return 0;
}

int32_t hsa_gpu_fill(void* data, int32_t byte, int64_t bytes, void* stream) {
  return cudaMemsetAsync(data, byte, bytes, (cudaStream_t)stream);
}

const char* hsa_gpu_message(int32_t error) { return cudaGetErrorString((cudaError_t)error); }
