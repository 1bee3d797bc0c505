/* The operators that are whole in fused.cu and fused.cc: attributes, checks of the arguments, and the pass to make. */
#pragma once

#include "operators.h"

namespace hsa {

inline float epsilon_of(const ort::KernelInfo* info) {
  const float epsilon = optional(api.KernelInfoGetAttribute_float, info, "epsilon");
  require(epsilon >= 0 && epsilon < INFINITY, "hsa: attribute epsilon must not be negative, got " + std::to_string(epsilon));
  return epsilon;
}

/* Rows of the last dimension's width. */
inline hsa_pass pass_over(int32_t op, int32_t dtype, const Tensor& x, int64_t width) {
  hsa_pass pass{};
  pass.op = op, pass.dtype = dtype, pass.width = width;
  pass.rows = x.elements() / std::max<int64_t>(1, x.shape.back());
  return pass;
}

inline void require_some(const Tensor& x) {
  if (x.shape.empty()) refuse(std::string("hsa: ") + x.name + " has no dimensions");
}

struct AddNorm {
  static constexpr int32_t kOp = HSA_ADD_NORM;
  static constexpr ort::Element kInputs[] = {kT, kT, kT};
  static constexpr ort::Element kOutputs[] = {kT, kT};

  float epsilon;

  explicit AddNorm(const ort::KernelInfo* info) : epsilon(epsilon_of(info)) {}

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor x = input(context, 0, "x", 0), added = input(context, 1, "added", 0), weight = input(context, 2, "weight", 1);
    require_some(x);
    require_shape(added, x.shape, "x's shape");
    require_shape(weight, {x.shape.back()}, "[d]");
    const Tensor sum = output(context, 0, "sum", x.shape), normed = output(context, 1, "normed", x.shape);
    if (x.elements() == 0) return;
    hsa_pass pass = pass_over(kOp, dtype, x, x.shape.back());
    pass.epsilon = epsilon;
    void* const tensors[] = {x.data, added.data, weight.data, sum.data, normed.data};
    std::copy(std::begin(tensors), std::end(tensors), pass.tensors);
    Provider::run(pass, context);
  }
};

struct RmsNorm {
  static constexpr int32_t kOp = HSA_RMS_NORM;
  static constexpr ort::Element kInputs[] = {kT, kT};
  static constexpr ort::Element kOutputs[] = {kT};

  float epsilon;

  explicit RmsNorm(const ort::KernelInfo* info) : epsilon(epsilon_of(info)) {}

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor x = input(context, 0, "x", 0), weight = input(context, 1, "weight", 1);
    require_some(x);
    require_shape(weight, {x.shape.back()}, "[d]");
    const Tensor normed = output(context, 0, "normed", x.shape);
    if (x.elements() == 0) return;
    hsa_pass pass = pass_over(kOp, dtype, x, x.shape.back());
    pass.epsilon = epsilon;
    pass.tensors[0] = x.data, pass.tensors[2] = weight.data, pass.tensors[4] = normed.data;
    Provider::run(pass, context);
  }
};

struct RotaryHeads {
  static constexpr int32_t kOp = HSA_ROTARY_HEADS;
  static constexpr ort::Element kInputs[] = {kT, kT, kT, ort::kFloat, ort::kFloat};
  static constexpr ort::Element kOutputs[] = {kT, kT, kT};

  int64_t q_heads, kv_heads, normalize;
  float epsilon;

  explicit RotaryHeads(const ort::KernelInfo* info)
      : q_heads(attribute(info, "num_heads")), kv_heads(attribute(info, "kv_num_heads")),
        normalize(attribute(info, "normalize")), epsilon(epsilon_of(info)) {
    require_positive("num_heads", q_heads);
    require_positive("kv_num_heads", kv_heads);
    require(normalize == 0 || normalize == 1, "hsa.RotaryHeads: normalize must be 0 or 1, got " + std::to_string(normalize));
  }

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor qkv = input(context, 0, "qkv", 3), q_weight = input(context, 1, "q_weight", 1);
    const Tensor k_weight = input(context, 2, "k_weight", 1), cos = input(context, 3, "cos", 3), sin = input(context, 4, "sin", 3);
    const int64_t B = qkv.shape[0], L = qkv.shape[1], D = q_weight.shape[0];
    if (D < 1 || D % 2) refuse("hsa.RotaryHeads: heads must have an even width, got " + std::to_string(D));
    require_shape(qkv, {B, L, (q_heads + 2 * kv_heads) * D}, "[B, L, (Hq + 2*Hkv)*D]");
    require_shape(k_weight, {D}, "[D]");
    require_shape(cos, {cos.shape[0] == 1 ? 1 : B, L, D / 2}, "[B or 1, L, D/2]");
    require_shape(sin, cos.shape, "cos's shape");
    const Tensor q = output(context, 0, "q", {B, L, q_heads, D});
    const Tensor k = output(context, 1, "k", {B, L, kv_heads, D}), v = output(context, 2, "v", {B, L, kv_heads, D});
    if (B * L == 0) return;
    hsa_pass pass = pass_over(kOp, dtype, qkv, D);
    pass.epsilon = epsilon, pass.normalize = int32_t(normalize);
    pass.q_heads = q_heads, pass.kv_heads = kv_heads, pass.angles = cos.shape[0] * L;
    void* const tensors[] = {qkv.data, q_weight.data, k_weight.data, cos.data, sin.data, q.data, k.data, v.data};
    std::copy(std::begin(tensors), std::end(tensors), pass.tensors);
    Provider::run(pass, context);
  }
};

struct SwiGlu {
  static constexpr int32_t kOp = HSA_SWIGLU;
  static constexpr ort::Element kInputs[] = {kT};
  static constexpr ort::Element kOutputs[] = {kT};

  explicit SwiGlu(const ort::KernelInfo*) {}

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor gate_up = input(context, 0, "gate_up", 0);
    require_some(gate_up);
    std::vector<int64_t> shape = gate_up.shape;
    if (shape.back() % 2) refuse("hsa.SwiGlu: gate_up must be two halves, got " + text(shape));
    shape.back() /= 2;
    const Tensor o = output(context, 0, "o", shape);
    if (o.elements() == 0) return;
    hsa_pass pass = pass_over(kOp, dtype, gate_up, shape.back());
    pass.tensors[0] = gate_up.data, pass.tensors[1] = o.data;
    Provider::run(pass, context);
  }
};

struct TakeRows {
  static constexpr int32_t kOp = HSA_TAKE_ROWS;
  static constexpr ort::Element kInputs[] = {kT, ort::kInt64};
  static constexpr ort::Element kOutputs[] = {kT};

  explicit TakeRows(const ort::KernelInfo*) {}

  template <typename Provider>
  void compute(ort::KernelContext* context, int32_t dtype) const {
    const Tensor x = input(context, 0, "x", 0), index = input(context, 1, "index", 0);
    const size_t rank = x.shape.size();
    if (rank < 2) refuse("hsa.TakeRows: x must have rows, got " + text(x.shape));
    const int64_t table = x.shape[rank - 2], count = index.elements();
    std::vector<int64_t> shape(x.shape.begin(), x.shape.end() - 2);
    shape.insert(shape.end(), index.shape.begin(), index.shape.end());
    shape.push_back(x.shape.back());
    if (Provider::kHost) require_rows(static_cast<const int64_t*>(index.data), count, table);
    const Tensor taken = output(context, 0, "taken", shape);
    if (taken.elements() == 0) return;
    hsa_pass pass = pass_over(kOp, dtype, taken, x.shape.back());
    pass.indices = count, pass.table = table;
    pass.tensors[0] = x.data, pass.tensors[1] = index.data, pass.tensors[2] = taken.data;
    Provider::run(pass, context);
  }

  static void require_rows(const int64_t* index, int64_t count, int64_t table) {
    for (int64_t i = 0; i < count; ++i)
      if (index[i] < -table || index[i] >= table)
        refuse("hsa.TakeRows: index must lie in 0 … " + std::to_string(table - 1) + ", got " + std::to_string(index[i]));
  }
};

}  // namespace hsa
