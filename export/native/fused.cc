/* What stands between a model's matrix products, each in one pass over memory, on a CPU. Computed in float, rounded once;
 * the loops are such that compilers make vector instructions of them, for each level of x86-64 its own.
 */
#include "fused.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HSA_LEVELS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HSA_LEVELS
#endif
#define HSA_INLINE inline __attribute__((always_inline))

namespace {

HSA_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HSA_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

struct Half {
  uint16_t bits;
};

struct Brain {
  uint16_t bits;
};

HSA_INLINE float get(float x) { return x; }
HSA_INLINE float get(Brain x) { return from_bits(uint32_t(x.bits) << 16); }

HSA_INLINE float get(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  const float value = from_bits(rest) * 0x1p112f; /* the exponents' other bias; subnormals come out normal */
  return from_bits(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : to_bits(value)));
}

HSA_INLINE void put(float* to, float x) { *to = x; }

HSA_INLINE void put(Brain* to, float x) {
  const uint32_t u = to_bits(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  to->bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}

HSA_INLINE void put(Half* to, float x) {
  const uint32_t u = to_bits(x), magnitude = u & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000; /* rounds at 2^-24 */
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  to->bits = uint16_t(u >> 16 & 0x8000) | uint16_t(magnitude >= 0x477ff000 ? large : finite);
}

/* e^x to 2e-7 of it, for vector instructions; x is kept where that is neither 0 nor infinite. */
HSA_INLINE float exponential(float x) {
  const float kept = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = kept * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* rounds: the sum has no bits below 1 */
  const float r = (kept - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return from_bits(uint32_t(int32_t(n) + 127) << 23) * (p * r * r + r + 1.0f);
}

constexpr int kLanes = 16;

/* As many partial sums as vector instructions take, in an order that no level of CPU changes. */
struct Sum {
  float lane[kLanes] = {};

  HSA_INLINE float total() const {
    float sum = 0;
    for (int j = 0; j < kLanes; ++j) sum += lane[j];
    return sum;
  }
};

template <typename T>
HSA_INLINE float square_sum(const T* x, int64_t width) {
  Sum sum;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sum.lane[j] += get(x[i + j]) * get(x[i + j]);
  for (int j = 0; i < width; ++i, ++j) sum.lane[j] += get(x[i]) * get(x[i]);
  return sum.total();
}

template <typename T>
HSA_INLINE void norm(const hsa_pass& p, int64_t begin, int64_t end) {
  const T *x = (const T*)p.tensors[0], *added = (const T*)p.tensors[1], *weight = (const T*)p.tensors[2];
  T *sum = (T*)p.tensors[3], *normed = (T*)p.tensors[4];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * p.width;
    const T* source = x + at;
    if (added) {
      for (int64_t i = 0; i < p.width; ++i) put(sum + at + i, get(x[at + i]) + get(added[at + i]));
      source = sum + at;
    }
    const float scale = 1 / std::sqrt(square_sum(source, p.width) / float(p.width) + p.epsilon);
    for (int64_t i = 0; i < p.width; ++i) put(normed + at + i, get(source[i]) * scale * get(weight[i]));
  }
}

template <typename T>
HSA_INLINE void turn(const hsa_pass& p, const T* head, const T* weight, const float* cos, const float* sin, T* to) {
  const int64_t half = p.width / 2;
  const float scale = p.normalize ? 1 / std::sqrt(square_sum(head, p.width) / float(p.width) + p.epsilon) : 1;
  for (int64_t i = 0; i < half; ++i) {
    float a = get(head[i]), b = get(head[half + i]);
    if (p.normalize) a *= scale * get(weight[i]), b *= scale * get(weight[half + i]);
    put(to + i, a * cos[i] - b * sin[i]);
    put(to + half + i, b * cos[i] + a * sin[i]);
  }
}

template <typename T>
HSA_INLINE void rotary_heads(const hsa_pass& p, int64_t begin, int64_t end) {
  const int64_t D = p.width, Hq = p.q_heads, Hkv = p.kv_heads;
  const T *qkv = (const T*)p.tensors[0], *q_weight = (const T*)p.tensors[1], *k_weight = (const T*)p.tensors[2];
  const float *cos = (const float*)p.tensors[3], *sin = (const float*)p.tensors[4];
  T *q = (T*)p.tensors[5], *k = (T*)p.tensors[6], *v = (T*)p.tensors[7];
  for (int64_t row = begin; row < end; ++row) {
    const T* from = qkv + row * (Hq + 2 * Hkv) * D;
    const int64_t angle = row % p.angles * (D / 2);
    for (int64_t h = 0; h < Hq; ++h, from += D) turn(p, from, q_weight, cos + angle, sin + angle, q + (row * Hq + h) * D);
    for (int64_t h = 0; h < Hkv; ++h, from += D) turn(p, from, k_weight, cos + angle, sin + angle, k + (row * Hkv + h) * D);
    memcpy(v + row * Hkv * D, from, Hkv * D * sizeof(T));
  }
}

template <typename T>
HSA_INLINE void swiglu(const hsa_pass& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = (const T*)p.tensors[0] + row * 2 * p.width, *up = gate + p.width;
    T* o = (T*)p.tensors[1] + row * p.width;
    for (int64_t i = 0; i < p.width; ++i) {
      const float g = get(gate[i]);
      put(o + i, g / (1 + exponential(-g)) * get(up[i]));
    }
  }
}

template <typename T>
HSA_INLINE void take_rows(const hsa_pass& p, int64_t begin, int64_t end) {
  const T* x = (const T*)p.tensors[0];
  const int64_t* index = (const int64_t*)p.tensors[1];
  T* taken = (T*)p.tensors[2];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = index[row % p.indices], from = row / p.indices * p.table + (at < 0 ? at + p.table : at);
    memcpy(taken + row * p.width, x + from * p.width, p.width * sizeof(T));
  }
}

template <typename T>
HSA_INLINE void run(const hsa_pass& p, int64_t begin, int64_t end) {
  if (p.op == HSA_ROTARY_HEADS) rotary_heads<T>(p, begin, end);
  else if (p.op == HSA_SWIGLU) swiglu<T>(p, begin, end);
  else if (p.op == HSA_TAKE_ROWS) take_rows<T>(p, begin, end);
  else norm<T>(p, begin, end);
}

HSA_LEVELS void run_float(const hsa_pass& p, int64_t begin, int64_t end) { run<float>(p, begin, end); }
HSA_LEVELS void run_half(const hsa_pass& p, int64_t begin, int64_t end) { run<Half>(p, begin, end); }
HSA_LEVELS void run_brain(const hsa_pass& p, int64_t begin, int64_t end) { run<Brain>(p, begin, end); }

}  // namespace

void hsa_cpu_pass(const hsa_pass* pass, int64_t begin, int64_t end) {
  if (pass->dtype == HSA_FLOAT32) run_float(*pass, begin, end);
  else if (pass->dtype == HSA_FLOAT16) run_half(*pass, begin, end);
  else run_brain(*pass, begin, end);
}
