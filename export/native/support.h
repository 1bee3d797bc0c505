/* What the operators share: errors, tensors, and a checked call. Inside, errors are thrown; each entry point catches. */
#pragma once

#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "fused.h"
#include "ort_abi.h"

namespace hsa {

extern ort::Api api;

using Statics = std::array<int64_t, HSA_STATICS>;
constexpr size_t kRank = 4;

// ---------------------------------------------------------------------------------------------------------- errors

struct Raised {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status) throw Raised{status};
}

[[noreturn]] inline void refuse(const std::string& message, int code = ort::kInvalidArgument) {
  throw Raised{api.CreateStatus(code, message.c_str())};
}

/* The message is composed whether it is needed or not: what every call checks asks first, then refuses. */
inline void require(bool condition, const std::string& message, int code = ort::kInvalidArgument) {
  if (!condition) refuse(message, code);
}

template <typename Body>
ort::Status* guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Raised& raised) {
    return raised.status;
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, error.what());
  }
}

// --------------------------------------------------------------------------------------------------------- tensors

struct Tensor {
  const char* name;
  void* data = nullptr;
  std::vector<int64_t> shape;
  const ort::MemoryInfo* memory = nullptr;

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

inline std::string text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

inline void require_rank(const Tensor& tensor, size_t rank) {
  if (tensor.shape.size() == rank) return;
  refuse(std::string("hsa: ") + tensor.name + " must have " + std::to_string(rank) + " dimensions, got " + text(tensor.shape));
}

/* rank: 0 for any. */
inline Tensor input(const ort::KernelContext* context, size_t index, const char* name, size_t rank) {
  Tensor tensor{name};
  const ort::Value* value = nullptr;
  check(api.KernelContext_GetInput(context, index, &value));
  if (!value) refuse(std::string("hsa: input ") + name + " is missing");
  ort::TypeShape* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<ort::TypeShape, void (*)(ort::TypeShape*)> release(info, api.ReleaseTensorTypeAndShapeInfo);
  size_t n = 0;
  check(api.GetDimensionsCount(info, &n));
  tensor.shape.resize(n);
  check(api.GetDimensions(info, tensor.shape.data(), n));
  if (rank) require_rank(tensor, rank);
  check(api.GetTensorMutableData(const_cast<ort::Value*>(value), &tensor.data));
  check(api.GetTensorMemoryInfo(value, &tensor.memory));
  return tensor;
}

inline Tensor output(ort::KernelContext* context, size_t index, const char* name, const std::vector<int64_t>& shape) {
  Tensor tensor{name, nullptr, shape};
  ort::Value* value = nullptr;
  check(api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  check(api.GetTensorMutableData(value, &tensor.data));
  return tensor;
}

inline void require_shape(const Tensor& tensor, const std::vector<int64_t>& expected, const char* meaning) {
  if (tensor.shape == expected) return;
  refuse(std::string("hsa: ") + tensor.name + " must be " + meaning + " = " + text(expected) + ", got " + text(tensor.shape));
}

// ----------------------------------------------------------------------------------------------------------- calls

constexpr const char* kOpNames[] = {"hsa.ChunkSelect", "hsa.ChunkAttention", "hsa.SlidingWindow", "hsa.Sample",
                                    "hsa.AddNorm",     "hsa.RmsNorm",        "hsa.RotaryHeads",   "hsa.SwiGlu",
                                    "hsa.TakeRows"};
constexpr const char* kDtypeNames[] = {"float32", "float16", "bfloat16"};

/* A problem as the library's table has it. */
struct Problem {
  int32_t op, dtype;
  Statics statics;
  float scale;
};

/* An operator's arguments: tensors in the order of kernel.h. */
struct Call {
  Problem problem;
  std::vector<void*> tensors;
  int64_t dims[3];                /* B, L, C; of Sample B, w, V */
  const ort::MemoryInfo* memory;  /* where the tensors lie */
};

std::string describe(const Problem& problem);

/* Says that no entry serves a problem, and what there is. */
[[noreturn]] void raise_no_kernel(const Problem& problem, bool gpu, const std::string& machine);

bool same_problem(const hsa_entry& entry, const Problem& problem);

#ifndef HSA_CUDA_PROVIDER /* tests have another provider play its part */
#define HSA_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

/* The providers: where tensors lie, whether values can be looked at, and who computes. */
struct Cpu {
  static constexpr bool kHost = true;
  static constexpr const char* kProvider = nullptr;  // the default one
  static bool serves(int32_t op, int32_t dtype);
  static void fill(void* data, int32_t byte, int64_t bytes, ort::KernelContext* context);
  static void run(const Call& call, ort::KernelContext* context);
  static void run(const hsa_pass& pass, ort::KernelContext* context);
};

struct Cuda {
  static constexpr bool kHost = false;
  static constexpr const char* kProvider = HSA_CUDA_PROVIDER;
  static bool serves(int32_t op, int32_t dtype);
  static void fill(void* data, int32_t byte, int64_t bytes, ort::KernelContext* context);
  static void run(const Call& call, ort::KernelContext* context);
  static void run(const hsa_pass& pass, ort::KernelContext* context);
};

}  // namespace hsa
