/* What stands between a model's matrix products, each in one pass over memory, on a GPU: norms with what is added before
 * them, queries and keys out of one product, gates, rows of a table. Any widths; those whose rows are whole vectors of 16 bytes at
 * addresses that are multiples of 16 are loaded and stored as such. Computed in float32, rounded once.
 *
 * A team of threads, a power of two and at most a warp, has a row.
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fused.h"

namespace {

constexpr int kWarp = 32, kThreads = 128;

/* N elements that are loaded and stored together. */
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T x[N];
};

template <int N, typename T>
__device__ Pack<T, N> load(const T* at) {
  return *reinterpret_cast<const Pack<T, N>*>(at);
}

template <int N, typename T>
__device__ void store(T* at, const Pack<T, N>& x) {
  *reinterpret_cast<Pack<T, N>*>(at) = x;
}

template <typename T, int N>
__device__ float squares(const Pack<T, N>& x) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) sum += float(x.x[j]) * float(x.x[j]);
  return sum;
}

__device__ float across_team(float x, int team) {
  for (int step = team / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

/* ------------------------------------------------------------------------------------------------------------- norms */

struct NormSizes {
  int64_t rows;
  int width, team, shift; /* team = 1 << shift */
  float epsilon;
};

template <typename T, int N>
__device__ Pack<T, N> added_up(Pack<T, N> a, const Pack<T, N>& b) {
#pragma unroll
  for (int j = 0; j < N; ++j) a.x[j] = T(float(a.x[j]) + float(b.x[j]));
  return a;
}

template <typename T, int N>
__device__ Pack<T, N> scaled(Pack<T, N> x, float scale, const Pack<T, N>& w) {
#pragma unroll
  for (int j = 0; j < N; ++j) x.x[j] = T(float(x.x[j]) * scale * float(w.x[j]));
  return x;
}

/* A thread holds HELD vectors of its row; with 0, the row is longer, and read a second time. */
template <typename T, int N, int HELD, bool ADDS>
__global__ void __launch_bounds__(kThreads) norm(const T* __restrict__ x, const T* __restrict__ added,
                                                 const T* __restrict__ weight, T* __restrict__ sum, T* __restrict__ y,
                                                 NormSizes p) {
  const int lane = threadIdx.x & (p.team - 1), stride = p.team * N;
  const int64_t row = int64_t(blockIdx.x) * (kThreads >> p.shift) + (threadIdx.x >> p.shift), begin = row * p.width;
  const int width = row < p.rows ? p.width : 0; /* teams without a row take part in the sums alone */
  float total = 0;
  if constexpr (HELD) {
    Pack<T, N> held[HELD] = {}, other[HELD] = {};
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int column = lane * N + i * stride;
      if (column >= width) continue;
      held[i] = load<N>(x + begin + column);
      if (ADDS) other[i] = load<N>(added + begin + column);
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int column = lane * N + i * stride;
      if (ADDS) held[i] = added_up(held[i], other[i]);
      total += squares(held[i]);
      if (ADDS && column < width) store(sum + begin + column, held[i]);
    }
    const float scale = rsqrtf(__fdividef(across_team(total, p.team), p.width) + p.epsilon);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int column = lane * N + i * stride;
      if (column < width) store(y + begin + column, scaled(held[i], scale, load<N>(weight + column)));
    }
  } else {
    for (int column = lane * N; column < width; column += stride) {
      Pack<T, N> one = load<N>(x + begin + column);
      if (ADDS) store(sum + begin + column, one = added_up(one, load<N>(added + begin + column)));
      total += squares(one);
    }
    const float scale = rsqrtf(__fdividef(across_team(total, p.team), p.width) + p.epsilon);
    const T* again = ADDS ? sum : x; /* a thread reads what it wrote itself */
    for (int column = lane * N; column < width; column += stride)
      store(y + begin + column, scaled(load<N>(again + begin + column), scale, load<N>(weight + column)));
  }
}

/* ------------------------------------------------------------------------------------- queries, keys and values, split */

struct HeadSizes {
  int64_t tokens, angles; /* token t takes angle t modulo angles */
  int q_heads, kv_heads, half, team, shift;
  int together;  /* tokens of a block */
  bool normalize;
  float epsilon;
};

/* What a vector of a head's first half and that of the second with which it turns are made of. */
template <typename T, int N>
struct Turn {
  Pack<T, N> a, b, wa, wb;
  Pack<float, N> c, s;

  __device__ float squared() const { return squares(a) + squares(b); }

  __device__ void apply(float scale, bool normalize) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float first = float(a.x[j]) * (normalize ? scale * float(wa.x[j]) : 1.0f);
      const float second = float(b.x[j]) * (normalize ? scale * float(wb.x[j]) : 1.0f);
      a.x[j] = T(first * c.x[j] - second * s.x[j]);
      b.x[j] = T(second * c.x[j] + first * s.x[j]);
    }
  }
};

/* A team has a head of a token. With ONCE a thread has one vector of each half; else heads are longer, and read twice. */
template <typename T, int N, bool ONCE>
__global__ void __launch_bounds__(kThreads, 8) rotary_heads(const T* __restrict__ qkv, const T* __restrict__ q_weight,
                                                         const T* __restrict__ k_weight, const float* __restrict__ cos,
                                                         const float* __restrict__ sin, T* __restrict__ q, T* __restrict__ k,
                                                         T* __restrict__ v, HeadSizes p) {
  const int heads = p.q_heads + 2 * p.kv_heads, D = 2 * p.half, lane = threadIdx.x & (p.team - 1), step = p.team * N;
  const int items = p.together * heads;
  for (int first = 0; first < items; first += kThreads >> p.shift) { /* as often in every thread, for the sums */
    const int item = first + (threadIdx.x >> p.shift), of_block = unsigned(item) / unsigned(heads);
    const int head = item - of_block * heads;
    const int64_t token = int64_t(blockIdx.x) * p.together + of_block;
    const bool is_q = head < p.q_heads, is_v = head >= p.q_heads + p.kv_heads;
    const int half = item < items && token < p.tokens ? p.half : 0;
    const T* const from = qkv + (token * heads + head) * D;
    const T* const weight = is_q ? q_weight : k_weight;
    const int64_t angle = (p.angles == p.tokens ? token : token % p.angles) * p.half;
    T* const to = is_q   ? q + (token * p.q_heads + head) * D
                  : is_v ? v + (token * p.kv_heads + head - p.q_heads - p.kv_heads) * D
                         : k + (token * p.kv_heads + head - p.q_heads) * D;
    Turn<T, N> turn = {};
    const auto read = [&](int column) {
      turn.a = load<N>(from + column), turn.b = load<N>(from + p.half + column);
      if (is_v) return;
      turn.wa = load<N>(weight + column), turn.wb = load<N>(weight + p.half + column);
      turn.c = load<N>(cos + angle + column), turn.s = load<N>(sin + angle + column);
    };
    float total = 0;
    for (int column = lane * N; column < half; column += step) {
      read(column);
      total += turn.squared();
      if (ONCE) break;
    }
    const float scale = rsqrtf(__fdividef(across_team(total, p.team), D) + p.epsilon);
    for (int column = lane * N; column < half; column += step) {
      if (!ONCE) read(column);
      if (!is_v) turn.apply(scale, p.normalize);
      store(to + column, turn.a), store(to + p.half + column, turn.b);
      if (ONCE) break;
    }
  }
}

/* ------------------------------------------------------------------------------------------------------------- gates */

/* A block has a part of a row. */
template <typename T, int N>
__global__ void swiglu(const T* __restrict__ gate_up, T* __restrict__ o, int inner, int threads) {
  const int64_t row = blockIdx.x;
  const int column = (int(blockIdx.y) * threads + threadIdx.x) * N;
  if (column >= inner) return;
  const T* const from = gate_up + row * 2 * inner + column;
  Pack<T, N> gate = load<N>(from);
  const Pack<T, N> up = load<N>(from + inner);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float g = float(gate.x[j]);
    gate.x[j] = T(__fdividef(g, 1.0f + __expf(-g)) * float(up.x[j]));
  }
  store(o + row * inner + column, gate);
}

/* -------------------------------------------------------------------------------------------------------------- rows */

/* A block has a part of a row. What is outside of the table is taken for 0. */
template <typename T, int N>
__global__ void take_rows(const T* __restrict__ x, const int64_t* __restrict__ index, T* __restrict__ taken, int width,
                          int64_t table, int64_t indices, int64_t rows, int threads) {
  const unsigned row = blockIdx.x, outer = indices == rows ? 0 : row / unsigned(indices);
  const int column = (int(blockIdx.y) * threads + threadIdx.x) * N;
  if (column >= width) return;
  int64_t at = index[row - outer * unsigned(indices)];
  if (at < 0) at += table;
  Pack<T, N> part = {};
  if (at >= 0 && at < table) part = load<N>(x + (outer * table + at) * width + column);
  store(taken + int64_t(row) * width + column, part);
}

/* --------------------------------------------------------------------------------------------------------- launchers */

template <typename T>
struct Same {
  using type = T;
};

template <typename... P>
int32_t launch(void (*kernel)(P...), dim3 grid, int threads, cudaStream_t stream, typename Same<P>::type... arguments) {
  void* pointers[] = {(void*)&arguments...};
  return cudaLaunchKernel((const void*)kernel, grid, dim3(threads), pointers, 0, stream);
}

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* The shift of the smallest team that has a thread for each of n vectors, or of a warp. */
int team_shift(int64_t n) {
  int shift = 0;
  while (shift < 5 && (1 << shift) < n) ++shift;
  return shift;
}

template <typename T>
constexpr int kVector = 16 / sizeof(T);

bool aligned(const hsa_pass& pass) {
  for (const void* tensor : pass.tensors)
    if ((uintptr_t)tensor % 16) return false;
  return true;
}

template <typename T, int N, int HELD, bool ADDS>
int32_t launch_norm(const hsa_pass& pass, NormSizes p, cudaStream_t stream) {
  void* const* t = pass.tensors;
  const dim3 grid(blocks_of(p.rows, kThreads >> p.shift));
  return launch(norm<T, N, HELD, ADDS>, grid, kThreads, stream, (const T*)t[0], (const T*)t[1], (const T*)t[2], (T*)t[3],
                (T*)t[4], p);
}

template <typename T, bool ADDS>
int32_t run_norm(const hsa_pass& pass, cudaStream_t stream) {
  constexpr int N = kVector<T>;
  const bool whole = aligned(pass) && pass.width % N == 0;
  const int64_t vectors = whole ? pass.width / N : pass.width, each = blocks_of(vectors, kWarp);
  const int shift = team_shift(vectors);
  const NormSizes p{pass.rows, int(pass.width), 1 << shift, shift, pass.epsilon};
  if (!whole) return launch_norm<T, 1, 0, ADDS>(pass, p, stream);
  if (each == 1) return launch_norm<T, N, 1, ADDS>(pass, p, stream);
  if (each == 2) return launch_norm<T, N, 2, ADDS>(pass, p, stream);
  if (each <= 4) return launch_norm<T, N, 4, ADDS>(pass, p, stream);
  if (each <= 8) return launch_norm<T, N, 8, ADDS>(pass, p, stream);
  return launch_norm<T, N, 0, ADDS>(pass, p, stream);
}

template <typename T, int N>
int32_t launch_heads(const hsa_pass& pass, cudaStream_t stream) {
  void* const* t = pass.tensors;
  const int64_t half = pass.width / 2, heads = pass.q_heads + 2 * pass.kv_heads;
  const int shift = team_shift(blocks_of(half, N)), teams = kThreads >> shift;
  const int together = heads < teams ? int(teams / heads) : 1;
  const HeadSizes p{pass.rows, pass.angles, int(pass.q_heads), int(pass.kv_heads), int(half), 1 << shift, shift, together,
                    pass.normalize != 0, pass.epsilon};
  const auto kernel = half <= N << shift ? rotary_heads<T, N, true> : rotary_heads<T, N, false>;
  return launch(kernel, dim3(blocks_of(p.tokens, together)), kThreads, stream, (const T*)t[0], (const T*)t[1],
                (const T*)t[2], (const float*)t[3], (const float*)t[4], (T*)t[5], (T*)t[6], (T*)t[7], p);
}

/* Of swiglu and take_rows: blocks a row, and threads a block. */
template <typename T, int N>
int32_t launch_parts(const hsa_pass& pass, cudaStream_t stream) {
  const int64_t vectors = blocks_of(pass.width, N), parts = blocks_of(vectors, 512);
  const int threads = int(blocks_of(blocks_of(vectors, parts), kWarp) * kWarp), width = int(pass.width);
  const dim3 grid(pass.rows, parts);
  const T* const x = (const T*)pass.tensors[0];
  if (pass.op == HSA_SWIGLU) return launch(swiglu<T, N>, grid, threads, stream, x, (T*)pass.tensors[1], width, threads);
  return launch(take_rows<T, N>, grid, threads, stream, x, (const int64_t*)pass.tensors[1], (T*)pass.tensors[2], width,
                pass.table, pass.indices, pass.rows, threads);
}

template <typename T>
int32_t run(const hsa_pass& pass, cudaStream_t stream) {
  constexpr int N = kVector<T>;
  if (pass.op == HSA_ADD_NORM) return run_norm<T, true>(pass, stream);
  if (pass.op == HSA_RMS_NORM) return run_norm<T, false>(pass, stream);
  if (pass.op == HSA_ROTARY_HEADS)
    return aligned(pass) && pass.width / 2 % N == 0 ? launch_heads<T, N>(pass, stream) : launch_heads<T, 1>(pass, stream);
  return aligned(pass) && pass.width % N == 0 ? launch_parts<T, N>(pass, stream) : launch_parts<T, 1>(pass, stream);
}

}  // namespace

int32_t hsa_gpu_pass(const hsa_pass* pass, void* stream) {
  if (pass->dtype == HSA_FLOAT32) return run<float>(*pass, (cudaStream_t)stream);
  if (pass->dtype == HSA_FLOAT16) return run<__half>(*pass, (cudaStream_t)stream);
  return run<__nv_bfloat16>(*pass, (cudaStream_t)stream);
}
