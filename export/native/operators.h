/* The operators of domain hsa: attributes, checks of the arguments, and the call that a provider computes. */
#pragma once

#include <algorithm>
#include <cmath>

#include "support.h"

namespace hsa {

constexpr ort::Element kT = static_cast<ort::Element>(0);  // in tables of types: the operator's own

inline int64_t attribute(const ort::KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api.KernelInfoGetAttribute_int64(info, name, &value));
  return value;
}

template <typename T>
T optional(ort::Status* (*get)(const ort::KernelInfo*, const char*, T*), const ort::KernelInfo* info, const char* name) {
  T value = 0;
  if (ort::Status* status = get(info, name, &value)) {
    api.ReleaseStatus(status);
    return 0;
  }
  return value;
}

inline void require_positive(const char* name, int64_t value) {
  require(value >= 1, std::string("hsa: attribute ") + name + " must be positive, got " + std::to_string(value));
}

inline void require_range(const char* what, const int64_t* values, int64_t count, int64_t most) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] > most)
      refuse(std::string(what) + " must lie in 0 … " + std::to_string(most) + ", got " + std::to_string(values[i]));
}

inline void require_positions(const char* op, const Tensor& position) {
  for (int64_t i = 0; i < position.shape[0]; ++i) {
    const int64_t t = static_cast<const int64_t*>(position.data)[i];
    if (t < 0) refuse(std::string(op) + ": position must not be negative, got " + std::to_string(t));
  }
}

struct Select {
  static constexpr int32_t kOp = HSA_CHUNK_SELECT;
  static constexpr ort::Element kInputs[] = {kT, kT, ort::kInt64, ort::kInt64};
  static constexpr ort::Element kOutputs[] = {ort::kInt32, ort::kFloat};

  int64_t kv_heads, chunk_size, top_k, window;

  explicit Select(const ort::KernelInfo* info)
      : kv_heads(attribute(info, "kv_num_heads")), chunk_size(attribute(info, "chunk_size")), top_k(attribute(info, "top_k")),
        window(optional(api.KernelInfoGetAttribute_int64, info, "window")) {
    require_positive("kv_num_heads", kv_heads);
    require_positive("chunk_size", chunk_size);
    require_positive("top_k", top_k);
  }

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor q = input(context, 0, "q_r", kRank), landmark = input(context, 1, "landmark", kRank);
    const Tensor position = input(context, 2, "position", 1), chunks = input(context, 3, "chunks", 1);
    const int64_t B = q.shape[0], L = q.shape[1], C = landmark.shape[1];
    require_shape(landmark, {B, C, q.shape[2], q.shape[3]}, "[B, C, Hr, Dr]");
    require_shape(position, {B}, "[B]");
    require_shape(chunks, {B}, "[B]");
    if (Provider::kHost) {
      require_positions("hsa.ChunkSelect", position);
      require_range("hsa.ChunkSelect: chunks", static_cast<const int64_t*>(chunks.data), B, C);
    }
    const std::vector<int64_t> shape{B, L, kv_heads, top_k};
    const Tensor indices = output(context, 0, "indices", shape), scores = output(context, 1, "scores", shape);
    const int64_t n = indices.elements();
    if (n == 0) return;
    if (C == 0) {
      Provider::fill(indices.data, 0xFF, n * 4, context);
      Provider::fill(scores.data, 0, n * 4, context);
      return;
    }
    const Problem problem{kOp, dtype, {kv_heads, q.shape[2], q.shape[3], chunk_size, top_k, window}, 0};
    const std::vector<void*> tensors{q.data, landmark.data, position.data, chunks.data, indices.data, scores.data};
    Provider::run({problem, tensors, {B, L, C}, q.memory}, context);
  }
};

struct Attention {
  static constexpr int32_t kOp = HSA_CHUNK_ATTENTION;
  static constexpr ort::Element kInputs[] = {kT, kT, kT, ort::kInt32, ort::kFloat};
  static constexpr ort::Element kOutputs[] = {kT};

  int64_t chunk_size, off_by_one;
  float scale;

  explicit Attention(const ort::KernelInfo* info)
      : chunk_size(attribute(info, "chunk_size")), off_by_one(optional(api.KernelInfoGetAttribute_int64, info, "off_by_one")),
        scale(optional(api.KernelInfoGetAttribute_float, info, "scale")) {
    require_positive("chunk_size", chunk_size);
    require(off_by_one == 0 || off_by_one == 1, "hsa.ChunkAttention: off_by_one must be 0 or 1, got " + std::to_string(off_by_one));
    require(scale >= 0 && scale < INFINITY, "hsa.ChunkAttention: scale must be positive, or 0 for 1/sqrt(D), got " + std::to_string(scale));
  }

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor q = input(context, 0, "q", kRank), k = input(context, 1, "k", kRank), v = input(context, 2, "v", kRank);
    const Tensor indices = input(context, 3, "indices", kRank), weights = input(context, 4, "weights", kRank);
    const int64_t B = q.shape[0], L = q.shape[1], D = q.shape[3], Hkv = k.shape[2], K = indices.shape[3];
    require_shape(k, {B, k.shape[1], Hkv, D}, "[B, C*S, Hkv, D]");
    require_shape(v, k.shape, "k's shape");
    require_shape(indices, {B, L, Hkv, K}, "[B, L, Hkv, K]");
    require_shape(weights, indices.shape, "[B, L, Hkv, K]");
    if (k.shape[1] % chunk_size)
      refuse("hsa.ChunkAttention: k has " + std::to_string(k.shape[1]) + " tokens, not a multiple of chunk_size " +
             std::to_string(chunk_size));
    const int64_t C = k.shape[1] / chunk_size;
    if (Provider::kHost) require_indices(indices, C);
    const Tensor o = output(context, 0, "o", q.shape);
    if (o.elements() == 0) return;
    if (C == 0 || K == 0) return Provider::fill(o.data, 0, o.elements() * (dtype == HSA_FLOAT32 ? 4 : 2), context);
    const bool usual = scale == static_cast<float>(1 / std::sqrt(static_cast<double>(D)));
    const Problem problem{kOp, dtype, {q.shape[2], Hkv, D, chunk_size, K, off_by_one}, usual ? 0 : scale};
    const std::vector<void*> tensors{q.data, k.data, v.data, indices.data, weights.data, o.data};
    Provider::run({problem, tensors, {B, L, C}, q.memory}, context);
  }

  static void require_indices(const Tensor& indices, int64_t C) {
    const int32_t* data = static_cast<const int32_t*>(indices.data);
    const int64_t n = indices.elements();
    if (n == 0) return;
    const auto [low, high] = std::minmax_element(data, data + n);
    if (*low < -1 || *high >= C)
      refuse("hsa.ChunkAttention: indices must lie in -1 (empty) … " + std::to_string(C - 1) + ", found " + std::to_string(*low) +
             " … " + std::to_string(*high));
  }
};

struct Window {
  static constexpr int32_t kOp = HSA_SLIDING_WINDOW;
  static constexpr ort::Element kInputs[] = {kT, kT, kT, kT, kT, ort::kInt64, ort::kInt64};
  static constexpr ort::Element kOutputs[] = {kT, kT, kT};

  explicit Window(const ort::KernelInfo*) {}

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor q = input(context, 0, "q", kRank), k = input(context, 1, "k", kRank), v = input(context, 2, "v", kRank);
    const Tensor past_k = input(context, 3, "past_k", kRank), past_v = input(context, 4, "past_v", kRank);
    const Tensor position = input(context, 5, "position", 1), lengths = input(context, 6, "lengths", 1);
    const int64_t B = q.shape[0], L = q.shape[1], D = q.shape[3], Hkv = k.shape[2], W = past_k.shape[1];
    require_shape(k, {B, L, Hkv, D}, "[B, L, Hkv, D]");
    require_shape(v, k.shape, "k's shape");
    require_shape(past_k, {B, W, Hkv, D}, "[B, W, Hkv, D]");
    require_shape(past_v, past_k.shape, "past_k's shape");
    require_shape(position, {B}, "[B]");
    require_shape(lengths, {B}, "[B]");
    if (W < 1) refuse("hsa.SlidingWindow: past_k has no slots; the window must be at least 1");
    if (Provider::kHost) {
      require_positions("hsa.SlidingWindow", position);
      require_range("hsa.SlidingWindow: lengths", static_cast<const int64_t*>(lengths.data), B, L);
    }
    const Tensor o = output(context, 0, "o", q.shape);
    const Tensor present_k = output(context, 1, "present_k", past_k.shape);
    const Tensor present_v = output(context, 2, "present_v", past_k.shape);
    const bool in_place = present_k.data == past_k.data && present_v.data == past_v.data;
    const int64_t slots = in_place ? std::min(L, W) : W;
    if (o.elements() == 0 && (slots == 0 || present_k.elements() == 0)) return;
    const Problem problem{kOp, dtype, {q.shape[2], Hkv, D, W, 0, 0}, 0};
    const std::vector<void*> tensors{q.data, k.data, v.data, past_k.data, past_v.data, position.data,
                                     lengths.data, o.data, present_k.data, present_v.data};
    Provider::run({problem, tensors, {B, L, slots}, q.memory}, context);
  }
};

/* Needs no compiled kernel: one serves all sizes. */
struct Sample {
  static constexpr int32_t kOp = HSA_SAMPLE;
  static constexpr ort::Element kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr ort::Element kOutputs[] = {ort::kInt64};

  explicit Sample(const ort::KernelInfo*) {}

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor logits = input(context, 0, "logits", 3), temperature = input(context, 1, "temperature", 1);
    const Tensor top_p = input(context, 2, "top_p", 1), uniform = input(context, 3, "uniform", 1);
    const int64_t B = logits.shape[0], w = logits.shape[1], V = logits.shape[2];
    for (const Tensor* tensor : {&temperature, &top_p, &uniform}) require_shape(*tensor, {B}, "[B]");
    if (V < 1 || V > kMostLogits) refuse("hsa.Sample: logits must be 1 … 2^23 a row, got " + std::to_string(V));
    if (Provider::kHost) require_choice(temperature, top_p, uniform);
    const Tensor token = output(context, 0, "token", {B, w});
    if (token.elements() == 0) return;
    const std::vector<void*> tensors{logits.data, temperature.data, top_p.data, uniform.data, token.data};
    Provider::run({{kOp, dtype, {V}, 0}, tensors, {B, w, V}, logits.memory}, context);
  }

  static constexpr int64_t kMostLogits = 1 << 23;  // whose masses fit into a sum

  static void require_choice(const Tensor& temperature, const Tensor& top_p, const Tensor& uniform) {
    const auto value = [](const Tensor& tensor, int64_t b) { return static_cast<const float*>(tensor.data)[b]; };
    for (int64_t b = 0; b < top_p.shape[0]; ++b)
      require(value(temperature, b) >= 0 && value(temperature, b) < INFINITY && value(top_p, b) > 0 && value(top_p, b) <= 1 &&
                  value(uniform, b) >= 0 && value(uniform, b) < 1,
              "hsa.Sample: temperature must be finite and at least 0, top_p above 0 and at most 1, uniform at least 0 and below 1");
  }
};

}  // namespace hsa
