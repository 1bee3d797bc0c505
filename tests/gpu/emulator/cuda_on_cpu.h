// Runs the CUDA source of a GPU program on a CPU: what its numbers are, and whether its barriers can lock up, without a
// GPU. Threads of a block are fibers that take turns in a random order. Asynchronous work is done as late or as early
// as the hardware may: bulk copies at a random later moment, matrix products when they are waited for.
#pragma once
#include <immintrin.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

using uchar = unsigned char;
using std::max;
using std::min;
struct dim3 {
  int64_t x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint1 make_uint1(unsigned x) { return {x}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float f) {
    uint32_t u = float_bits(f);
    bits = std::isnan(f) ? 0x7fff : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const { return bits_float(uint32_t(bits) << 16); }
};
struct half_t {
  uint16_t bits;
  half_t() = default;
  explicit half_t(float f) : bits(_cvtss_sh(f, 0)) {}
  operator float() const { return _cvtsh_ss(bits); }
};
template <class E> struct Pair { E x, y; };
using __nv_bfloat162 = Pair<bfloat16_t>;
using half2 = Pair<half_t>;
template <class E> unsigned packed(E x, E y) { return x.bits | unsigned(y.bits) << 16; }
inline unsigned __pack_nv_bfloat162(bfloat16_t x, bfloat16_t y) { return packed(x, y); }
inline unsigned __pack_half2(half_t x, half_t y) { return packed(x, y); }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {bfloat16_t(v.x), bfloat16_t(v.y)}; }
inline half2 __float22half2_rn(float2 v) { return {half_t(v.x), half_t(v.y)}; }

struct Rendezvous {
  int count = 0, generation = 0;
  uint32_t payload[2][1024][8];
};
struct Emulator {
  alignas(1024) uchar shared[232448];
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> done;
  ucontext_t scheduler;
  int current = 0, threads = 0;
  bool failed = false, progress = false;
  std::mt19937 random{1};
  std::function<void()> body;
  std::vector<std::function<void()>> copies;
  std::map<std::pair<int, int>, Rendezvous> meetings;

  void yield() { swapcontext(&fibers[current], &scheduler); }

  // Meets the threads whose index differs in the bits of `mask`; returns what each brought, by thread index.
  auto& meet(int mask, const void* bring = nullptr, int bytes = 0) {
    Rendezvous& r = meetings[{mask, current & ~mask}];
    const int generation = r.generation, me = current;
    int size = 0;
    for (int t = 0; t < threads; ++t) size += (t & ~mask) == (me & ~mask);
    if (bring) memcpy(r.payload[generation & 1][me], bring, bytes);
    if (++r.count == size) {
      r.count = 0;
      ++r.generation;
      progress = true;
    }
    while (r.generation == generation) yield();
    return r.payload[generation & 1];
  }

  static void enter() ;
  void copy_one() {
    const size_t i = random() % copies.size();
    copies[i]();
    copies.erase(copies.begin() + i);
    progress = true;
  }
  void run_block(int count, size_t bytes) {
    threads = count;
    memset(shared, 0xff, bytes);  // NaN in every format
    fibers.assign(count, {});
    if (int(stacks.size()) < count) stacks.resize(count, std::vector<char>(1 << 17));
    done.assign(count, false);
    meetings.clear();
    copies.clear();
    for (int t = 0; t < count; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = stacks[t].data();
      fibers[t].uc_stack.ss_size = stacks[t].size();
      fibers[t].uc_link = &scheduler;
      makecontext(&fibers[t], &Emulator::enter, 0);
    }
    std::vector<int> order(count);
    for (int t = 0; t < count; ++t) order[t] = t;
    while (std::count(done.begin(), done.end(), false) && !failed) {
      progress = false;
      std::shuffle(order.begin(), order.end(), random);
      for (int t : order)
        if (!done[t]) {
          current = t;
          swapcontext(&scheduler, &fibers[t]);
        }
      if (!copies.empty() && (!progress || random() % 4 == 0)) copy_one();
      if (!progress && copies.empty()) failed = true;  // every thread waits
    }
  }
};
inline Emulator emulator;
inline void Emulator::enter() {
  emulator.body();
  emulator.done[emulator.current] = true;
  emulator.progress = true;
}
struct ThreadIndex { operator int() const { return emulator.current; } };
struct { ThreadIndex x; int y = 0, z = 0; } inline threadIdx;
inline dim3 blockIdx;
inline void __syncthreads() { emulator.meet(1023); }
inline void __syncwarp(unsigned = 0) { emulator.meet(31); }
inline int64_t shared_offset(const void* p) { return (const uchar*)p - emulator.shared; }

// What warps and blocks exchange.
template <class T> T shuffle(T x, int from) {
  static_assert(sizeof(T) == 4);
  auto& all = emulator.meet(31, &x, 4);
  memcpy(&x, all[from], 4);
  return x;
}
inline int lane() { return emulator.current & 31; }
template <class T> T __shfl_sync(unsigned, T x, int from, int = 32) {
  return shuffle(x, (emulator.current & ~31) + (from & 31));
}
template <class T> T __shfl_up_sync(unsigned, T x, int by, int = 32) {
  return shuffle(x, emulator.current - (lane() >= by ? by : 0));
}
template <class T> T __shfl_xor_sync(unsigned, T x, int by, int = 32) { return shuffle(x, emulator.current ^ by); }
inline unsigned __ballot_sync(unsigned, int x) {
  auto& all = emulator.meet(31, &x, 4);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(all[(emulator.current & ~31) + i][0] != 0) << i;
  return votes;
}
template <class T> unsigned __match_any_sync(unsigned, T x) {
  auto& all = emulator.meet(31, &x, 4);
  uint32_t mine;
  memcpy(&mine, &x, 4);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= unsigned(all[(emulator.current & ~31) + i][0] == mine) << i;
  return same;
}
inline int any_of(int mask, int x) {
  auto& all = emulator.meet(mask, &x, 4);
  int found = 0;
  for (int t = 0; t < emulator.threads; ++t)
    if ((t & ~mask) == (emulator.current & ~mask)) found |= all[t][0] != 0;
  return found;
}
inline int __any_sync(unsigned, int x) { return any_of(31, x); }
inline int __syncthreads_or(int x) { return any_of(1023, x); }
inline int __popc(int x) { return __builtin_popcount(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int atomicOr(int* at, int bits) { const int old = *at; *at |= bits; return old; }
inline int atomicExch(int* at, int x) { const int old = *at; *at = x; return old; }
inline int atomicMax(int* at, int x) { const int old = *at; *at = max(*at, x); return old; }
template <class N> N atomicAdd(N* at, N x) { const N old = *at; *at += x; return old; }
inline void AtomicMax(int* at, int x, int = 0) { *at = max(*at, x); }
template <class T, class U> void AtomicAdd(T* at, U x, int = 0) { *at += T(x); }
template <class T, class U> T AtomicAddRet(T* at, U x, int = 0) { const T old = *at; *at += T(x); return old; }

// The runtime's interface.
enum cudaError_t { cudaSuccess, cudaErrorDeadlock };
enum { cudaEnableDefault };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return "deadlock, or more shared memory than a block may have"; }
template <class... P, size_t... I>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, void** a, size_t bytes, std::index_sequence<I...>) {
  emulator.failed = bytes > sizeof emulator.shared;  // what a thread block of sm_90 may take
  emulator.body = [=] { kernel(*(std::remove_const_t<P>*)a[I]...); };
  for (int64_t z = 0; z < grid.z; ++z)
    for (int64_t y = 0; y < grid.y; ++y)
      for (int64_t x = 0; x < grid.x && !emulator.failed; ++x) {
        blockIdx = dim3(x, y, z);
        emulator.run_block(int(block.x), bytes);
      }
  return emulator.failed ? cudaErrorDeadlock : cudaSuccess;
}
template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** a, size_t bytes, cudaStream_t) {
  return launch(kernel, grid, block, a, bytes, std::index_sequence_for<P...>());
}

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
using CUtensorMapDataType = int;
using CUtensorMapInterleave = int;
using CUtensorMapSwizzle = int;
using CUtensorMapL2promotion = int;
using CUtensorMapFloatOOBfill = int;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
struct CUtensorMap { const uchar* base; int rank, swizzle, bytes; uint64_t dim[5], stride[5]; uint32_t box[5]; };
inline CUresult cuTensorMapEncodeTiled(
    CUtensorMap* m, int type, unsigned rank, void* base, const uint64_t* dim, const uint64_t* stride, const uint32_t* box,
    const uint32_t*, int, int swizzle, int, int) {
  const int bytes = type == 7 ? 4 : 2;  // float32, or float16 and bfloat16
  *m = {(const uchar*)base, int(rank), swizzle, bytes, {}, {uint64_t(bytes)}, {}};
  bool valid = base && (uintptr_t)base % 16 == 0 && (swizzle == 0 || box[0] * bytes <= (16u << swizzle));
  for (unsigned i = 0; i < rank; ++i) {
    m->dim[i] = dim[i], m->box[i] = box[i];
    valid &= dim[i] > 0 && dim[i] <= (1ull << 32) && box[i] > 0 && box[i] <= 256;
    if (i) m->stride[i] = stride[i - 1], valid &= stride[i - 1] % 16 == 0 && stride[i - 1] < (1ull << 40);
  }
  return valid && box[0] * bytes % 16 == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** entry, int, int, cudaDriverEntryPointQueryResult*) {
  *entry = (void*)cuTensorMapEncodeTiled;
  return cudaSuccess;
}
inline int64_t swizzled(int64_t offset, int mode) {  // mode: 1, 2, 3 for 32, 64, 128 bytes
  return offset ^ (((offset >> 7) & ((1 << mode) - 1)) << 4);
}

struct Barrier {
  int32_t bytes;
  uint16_t pending, count : 15, phase : 1;
  void init(int n) { bytes = 0, pending = count = n, phase = 0; }
  void advance() {
    if (pending || bytes) return;
    pending = count, phase ^= 1;
    emulator.progress = true;
  }
  void expect_transaction(int n) { bytes += n; }
  void arrive() { --pending, advance(), emulator.progress = true; }
  void wait(int parity) { while (phase == (parity & 1)) emulator.yield(); }
};
static_assert(sizeof(Barrier) == 8);

namespace tl {
enum class DataType { kBFloat16, kFloat16, kFloat32 };
template <DataType> struct Element { using type = bfloat16_t; };
template <> struct Element<DataType::kFloat16> { using type = half_t; };
template <DataType A> float element(uint16_t bits) {
  typename Element<A>::type e;
  e.bits = bits;
  return e;
}
template <DataType A> float element(uint32_t pair, int i) { return element<A>(uint16_t(pair >> (16 * i))); }

template <int N> bool tl_shuffle_elect() { return N ? emulator.current % N == 0 : emulator.current == 0; }
inline void prefetch_tma_descriptor(const CUtensorMap&) {}
inline void fence_barrier_init() {}
template <int> void warpgroup_reg_alloc() {}
template <int> void warpgroup_reg_dealloc() {}
inline void __sync_thread_partial(int, int count) { emulator.meet(count - 1); }  // of aligned powers of two
inline void fence_proxy_async() {}
template <class... I> void tma_load(const CUtensorMap& m, Barrier& barrier, void* to, I... at) {
  const int64_t start[5] = {int64_t(at)...};
  const int64_t target = shared_offset(to);
  emulator.copies.push_back([=, &barrier] {
    int64_t i = 0, x[5] = {};
    int64_t total = 1;
    for (int d = 0; d < m.rank; ++d) total *= m.box[d];
    for (; i < total; ++i) {
      int64_t rest = i, from = 0;
      bool inside = true;
      for (int d = 0; d < m.rank; ++d) {
        x[d] = start[d] + rest % m.box[d], rest /= m.box[d];
        inside &= x[d] >= 0 && uint64_t(x[d]) < m.dim[d];
        from += x[d] * m.stride[d];
      }
      const uint32_t zero = 0;
      uchar* to = emulator.shared + swizzled(target + m.bytes * i, m.swizzle);
      memcpy(to, inside ? m.base + from : (const uchar*)&zero, m.bytes);
    }
    barrier.bytes -= int(m.bytes * total);
    barrier.advance();
  });
}

// Copies that a thread waits for itself, done no sooner.
struct Waiting { int group; void* to; uint4 what; int bytes; };
struct Copies { std::vector<Waiting> queue[1024]; int group[1024] = {}; };
inline Copies own_copies;
template <int bytes> void cp_async_gs_conditional(void* to, const void* from, bool inside) {
  static_assert(bytes <= 16);
  uint4 what = {};
  if (inside) memcpy(&what, from, bytes);
  const int me = emulator.current;
  own_copies.queue[me].push_back({own_copies.group[me], to, what, bytes});
}
template <int bytes> void cp_async_gs(void* to, const void* from) { cp_async_gs_conditional<bytes>(to, from, true); }
inline void cp_async_commit() { ++own_copies.group[emulator.current]; }
template <int left> void cp_async_wait() {
  auto& queue = own_copies.queue[emulator.current];
  const int before = own_copies.group[emulator.current] - left;
  for (auto& x : queue)
    if (x.group < before) memcpy(x.to, &x.what, x.bytes);
  std::erase_if(queue, [=](auto& x) { return x.group < before; });
}
template <class T> T warp_reduce_sum(T x) {
  for (int i = 16; i; i /= 2) x += shuffle(x, emulator.current ^ i);
  return x;
}

struct MaxOp { float operator()(float a, float b) const { return fmaxf(a, b); } };
struct SumOp { float operator()(float a, float b) const { return a + b; } };
template <int> struct NamedBarrier;
template <class Op, int threads, int scale, int offset, class B> struct AllReduce {
  static float run(float x, float* = nullptr) {
    // As a butterfly, so that all threads come to the same bits.
    for (int i = threads / 2; i >= scale; i /= 2) {
      auto& all = emulator.meet(threads - scale, &x, 4);
      x = Op()(x, bits_float(all[emulator.current ^ i][0]));
    }
    return x;
  }
};

// Matrix products of a warpgroup.
struct GmmaDescriptor {
  uint64_t bits = 0;
  GmmaDescriptor operator+(uint32_t n) const { return {(bits & ~0x3fffull) | ((bits + n) & 0x3fff)}; }
  explicit operator uint64_t() const { return bits; }
};
template <int layout, int leading, int stride, class P> void initialize_wgmma_descriptor(GmmaDescriptor& d, P* p) {
  d.bits = uint64_t(shared_offset(p) >> 4) | uint64_t(leading) << 16 | uint64_t(stride) << 32 | uint64_t(layout) << 62;
}
template <class I> void increase_descriptor_offset(GmmaDescriptor& d, I bytes) { d = d + uint32_t(bytes >> 4); }
// An element of a K-major matrix (rows of K), or of an MN-major one (rows of M or N).
inline uint16_t operand(uint64_t d, int mn, int k, bool mn_major) {
  const int64_t base = (d & 0x3fff) << 4, leading = ((d >> 16) & 0x3fff) << 4, stride = ((d >> 32) & 0x3fff) << 4;
  const int mode = 4 - int(d >> 62), width = 16 << mode, inner = width / 2;
  const int64_t offset = mn_major ? mn / inner * leading + k / 8 * stride + k % 8 * width + mn % inner * 2
                                  : mn / 8 * stride + mn % 8 * width + k * 2;
  uint16_t e;
  memcpy(&e, emulator.shared + swizzled(base + offset, mode), 2);
  return e;
}
struct Product {
  const uint32_t* a_registers;
  uint64_t a, b;
  float* c;
  bool add;
  void (*run)(const std::vector<Product*>&);
  int group;
};
struct Warpgroup { std::vector<Product> queue[1024]; int group[1024] = {}; };
inline Warpgroup products;
template <DataType A, int N, bool transposed> void multiply(const std::vector<Product*>& all) {
  static float b[16][N];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < N; ++n) b[k][n] = element<A>(operand(all[0]->b, n, k, transposed));
  for (int t = 0; t < 128; ++t)
    for (int half = 0; half < 2; ++half) {
      const int row = t / 32 * 16 + t % 32 / 4 + 8 * half;
      float a[16];
      for (int k = 0; k < 16; ++k)
        a[k] = all[0]->a_registers
                   ? element<A>(all[(t & ~3) + k % 8 / 2]->a_registers[half + k / 8 * 2], k % 2)
                   : element<A>(operand(all[0]->a, row, k, false));
      for (int j = 0; j < N / 4; ++j) {
        const int i = j / 2 * 4 + half * 2 + j % 2, column = j / 2 * 8 + t % 4 * 2 + j % 2;
        float sum = all[t]->add ? all[t]->c[i] : 0;
        for (int k = 0; k < 16; ++k) sum += a[k] * b[k][column];
        all[t]->c[i] = sum;
      }
    }
}
inline void issue(Product p) {
  p.group = products.group[emulator.current];
  products.queue[emulator.current].push_back(p);
}
template <DataType A, DataType, DataType, int M, int N, int K, bool ta, bool tb, int, int>
void wgmma_ss(uint64_t a, uint64_t b, uint32_t* c, int add) {
  static_assert(M == 64 && K == 16 && !ta);
  issue({nullptr, a, b, (float*)c, add != 0, multiply<A, N, tb>, 0});
}
template <DataType A, DataType, DataType, int M, int N, int K, bool ta, bool tb, int, int>
void wgmma_rs(const uint32_t* a, uint64_t b, uint32_t* c, int add) {
  static_assert(M == 64 && K == 16 && !ta);
  issue({a, 0, b, (float*)c, add != 0, multiply<A, N, tb>, 0});
}
template <class R> void warpgroup_fence_operand(R*, int) {}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { ++products.group[emulator.current]; }
template <int left> void warpgroup_wait();
template <int left> void wait_wgmma() { warpgroup_wait<left>(); }
template <int left> void warpgroup_wait() {
  const int me = emulator.current, first = me & ~127;
  emulator.meet(127);
  if (me == first)
    while (!products.queue[me].empty() && products.queue[me][0].group < products.group[me] - left) {
      std::vector<Product*> all;
      for (int t = 0; t < 128; ++t) all.push_back(&products.queue[first + t][0]);
      all[0]->run(all);
      for (int t = 0; t < 128; ++t) products.queue[first + t].erase(products.queue[first + t].begin());
    }
  emulator.meet(127);
}

// Matrix products of a warp.
inline void load_matrices(const void* from, void* to, bool transposed) {
  auto& all = emulator.meet(31, &from, 8);
  const int lane = emulator.current & 31, warp = emulator.current & ~31;
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 2; ++i) {
      const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
      const uint16_t* address;
      memcpy(&address, all[warp + j * 8 + row], 8);
      ((uint16_t*)to)[2 * j + i] = address[column];
    }
}
inline void ptx_ldmatrix_x4(const void* from, void* to) { load_matrices(from, to, false); }
inline void ptx_ldmatrix_x4_trans(const void* from, void* to) { load_matrices(from, to, true); }
template <DataType A, DataType, DataType, int M, int N, int K, bool ta, bool tb>
void mma_sync(float* c, const unsigned* a, const unsigned* b) {
  static_assert(M == 16 && N == 8 && K == 16 && !ta && tb);
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  auto& all = emulator.meet(31, mine, 24);
  const int lane = emulator.current & 31, warp = emulator.current & ~31;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      c[i] += element<A>(all[warp + row * 4 + k % 8 / 2][half + k / 8 * 2], k % 2) *
              element<A>(all[warp + column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  }
}
}  // namespace tl
