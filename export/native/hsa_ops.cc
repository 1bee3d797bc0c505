/* The operators ChunkSelect and ChunkAttention of domain hsa for ONNX Runtime's CPU provider, in float32.
 *
 * This file checks the arguments, finds the compiled kernel for their sizes and drives it on ONNX Runtime's own
 * threads. Whatever is wrong comes back as an OrtStatus: inside, errors are thrown, and each entry point catches.
 */
#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "library.h"
#include "ort_abi.h"

namespace {

ort::Api api;

using Statics = std::array<int64_t, HSA_STATICS>;
constexpr size_t kRank = 4;

// ---------------------------------------------------------------------------------------------------------- errors

struct Raised {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status) throw Raised{status};
}

void require(bool condition, const std::string& message, int code = ort::kInvalidArgument) {
  if (!condition) throw Raised{api.CreateStatus(code, message.c_str())};
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

// --------------------------------------------------------------------------------------------------------- kernels

constexpr const char* kOpNames[] = {"hsa.ChunkSelect", "hsa.ChunkAttention"};
constexpr const char* kStaticNames[][HSA_STATICS] = {
    {"kv_heads", "retrieval_heads", "retrieval_dim", "chunk_size", "top_k", "window"},
    {"q_heads", "kv_heads", "head_dim", "chunk_size", "top_k", "off_by_one"}};

std::string describe(int32_t op, const int64_t* statics) {
  std::string text;
  for (int i = 0; i < HSA_STATICS; ++i)
    text += std::string(i ? " " : "") + kStaticNames[op][i] + "=" + std::to_string(statics[i]);
  return text;
}

std::string inventory(int32_t op) {
  std::string text;
  for (int32_t i = 0; i < hsa_entry_count; ++i)
    if (hsa_entries[i].op == op) text += (text.empty() ? "" : "; ") + describe(op, hsa_entries[i].statics);
  return text.empty() ? "none" : text;
}

const hsa_kernel* find_kernel(int32_t op, const Statics& statics) {
  for (int32_t i = 0; i < hsa_entry_count; ++i)
    if (hsa_entries[i].op == op && std::equal(statics.begin(), statics.end(), hsa_entries[i].statics))
      return hsa_entries[i].kernel;
  require(false,
          std::string(kOpNames[op]) + ": no kernel for " + describe(op, statics.data()) + "; this library has: " +
              inventory(op) + ". Build the library for this problem, or run the model without it: its own functions do it.",
          ort::kNotImplemented);
  return nullptr;
}

struct Fork {
  void (*work)(void*);
  void* job;
};

void parallel(void* context, void (*work)(void*), void* job, int32_t threads) {
  Fork fork{work, job};
  const auto call = [](void* argument, size_t) {
    const Fork* fork = static_cast<const Fork*>(argument);
    fork->work(fork->job);
  };
  if (ort::Status* status = api.KernelContext_ParallelFor(static_cast<ort::KernelContext*>(context), call, threads, 0, &fork)) {
    api.ReleaseStatus(status);
    work(job);  // alone, then
  }
}

int32_t thread_count() {
  static const int32_t threads = std::max(1u, std::thread::hardware_concurrency());
  return threads;
}

void execute(int32_t op, const hsa_kernel* kernel, void* const* tensors, const int64_t* dims, ort::KernelContext* context) {
  const int failed = hsa_execute(kernel, tensors, dims, thread_count(), parallel, context);
  require(!failed, std::string(kOpNames[op]) + ": out of memory", ort::kFail);
}

// --------------------------------------------------------------------------------------------------------- tensors

struct Tensor {
  const char* name;
  void* data = nullptr;
  std::vector<int64_t> shape;

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

std::string text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

Tensor input(const ort::KernelContext* context, size_t index, const char* name, size_t rank) {
  Tensor tensor{name};
  const ort::Value* value = nullptr;
  check(api.KernelContext_GetInput(context, index, &value));
  require(value, std::string("hsa: input ") + name + " is missing");
  ort::TypeShape* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<ort::TypeShape, void (*)(ort::TypeShape*)> release(info, api.ReleaseTensorTypeAndShapeInfo);
  size_t n = 0;
  check(api.GetDimensionsCount(info, &n));
  tensor.shape.resize(n);
  check(api.GetDimensions(info, tensor.shape.data(), n));
  require(n == rank, std::string("hsa: ") + name + " must have " + std::to_string(rank) + " dimensions, got " + text(tensor.shape));
  check(api.GetTensorMutableData(const_cast<ort::Value*>(value), &tensor.data));
  return tensor;
}

Tensor output(ort::KernelContext* context, size_t index, const char* name, const std::vector<int64_t>& shape) {
  Tensor tensor{name, nullptr, shape};
  ort::Value* value = nullptr;
  check(api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  check(api.GetTensorMutableData(value, &tensor.data));
  return tensor;
}

void require_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* meaning) {
  require(tensor.shape == shape,
          std::string("hsa: ") + tensor.name + " must be " + meaning + " = " + text(shape) + ", got " + text(tensor.shape));
}

// ------------------------------------------------------------------------------------------------------- operators

int64_t attribute(const ort::KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api.KernelInfoGetAttribute_int64(info, name, &value));
  return value;
}

int64_t attribute_or_zero(const ort::KernelInfo* info, const char* name) {
  int64_t value = 0;
  ort::Status* status = api.KernelInfoGetAttribute_int64(info, name, &value);
  if (!status) return value;
  api.ReleaseStatus(status);
  return 0;
}

void require_positive(const char* name, int64_t value) {
  require(value > 0, std::string("hsa: attribute ") + name + " must be positive, got " + std::to_string(value));
}

struct Select {
  static constexpr int32_t kOp = HSA_CHUNK_SELECT;
  static constexpr ort::Element kInputs[] = {ort::kFloat, ort::kFloat, ort::kInt64, ort::kInt64};
  static constexpr ort::Element kOutputs[] = {ort::kInt32, ort::kFloat};

  int64_t kv_heads, chunk_size, top_k, window;

  explicit Select(const ort::KernelInfo* info)
      : kv_heads(attribute(info, "kv_num_heads")),
        chunk_size(attribute(info, "chunk_size")),
        top_k(attribute(info, "top_k")),
        window(attribute_or_zero(info, "window")) {
    require_positive("kv_num_heads", kv_heads);
    require_positive("chunk_size", chunk_size);
    require_positive("top_k", top_k);
  }

  void compute(ort::KernelContext* context) const {
    const Tensor q = input(context, 0, "q_r", kRank), landmark = input(context, 1, "landmark", kRank);
    const Tensor position = input(context, 2, "position", 1), chunks = input(context, 3, "chunks", 1);
    const int64_t B = q.shape[0], L = q.shape[1], C = landmark.shape[1];
    require_shape(landmark, {B, C, q.shape[2], q.shape[3]}, "[B, C, Hr, Dr]");
    require_shape(position, {B}, "[B]");
    require_shape(chunks, {B}, "[B]");
    for (int64_t b = 0; b < B; ++b) {
      const int64_t t = static_cast<const int64_t*>(position.data)[b], n = static_cast<const int64_t*>(chunks.data)[b];
      require(t >= 0, "hsa.ChunkSelect: position must not be negative, got " + std::to_string(t));
      require(0 <= n && n <= C, "hsa.ChunkSelect: chunks must lie in 0 … " + std::to_string(C) + ", got " + std::to_string(n));
    }
    const hsa_kernel* kernel = find_kernel(kOp, {kv_heads, q.shape[2], q.shape[3], chunk_size, top_k, window});
    const std::vector<int64_t> shape{B, L, kv_heads, top_k};
    const Tensor indices = output(context, 0, "indices", shape), scores = output(context, 1, "scores", shape);
    const int64_t n = indices.elements();
    if (n == 0) return;
    if (C == 0) {
      std::fill_n(static_cast<int32_t*>(indices.data), n, -1);
      std::fill_n(static_cast<float*>(scores.data), n, 0.0f);
      return;
    }
    void* const tensors[] = {q.data, landmark.data, position.data, chunks.data, indices.data, scores.data};
    const int64_t dims[] = {B, L, C};
    execute(kOp, kernel, tensors, dims, context);
  }
};

struct Attention {
  static constexpr int32_t kOp = HSA_CHUNK_ATTENTION;
  static constexpr ort::Element kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt32, ort::kFloat};
  static constexpr ort::Element kOutputs[] = {ort::kFloat};

  int64_t chunk_size, off_by_one;

  explicit Attention(const ort::KernelInfo* info)
      : chunk_size(attribute(info, "chunk_size")), off_by_one(attribute_or_zero(info, "off_by_one")) {
    require_positive("chunk_size", chunk_size);
    require(off_by_one == 0 || off_by_one == 1, "hsa.ChunkAttention: off_by_one must be 0 or 1, got " + std::to_string(off_by_one));
  }

  void compute(ort::KernelContext* context) const {
    const Tensor q = input(context, 0, "q", kRank), k = input(context, 1, "k", kRank), v = input(context, 2, "v", kRank);
    const Tensor indices = input(context, 3, "indices", kRank), weights = input(context, 4, "weights", kRank);
    const int64_t B = q.shape[0], L = q.shape[1], D = q.shape[3], Hkv = k.shape[2], K = indices.shape[3];
    require_shape(k, {B, k.shape[1], Hkv, D}, "[B, C*S, Hkv, D]");
    require_shape(v, k.shape, "k's shape");
    require_shape(indices, {B, L, Hkv, K}, "[B, L, Hkv, K]");
    require_shape(weights, indices.shape, "[B, L, Hkv, K]");
    require(k.shape[1] % chunk_size == 0, "hsa.ChunkAttention: k has " + std::to_string(k.shape[1]) +
                                              " tokens, not a multiple of chunk_size " + std::to_string(chunk_size));
    const int64_t C = k.shape[1] / chunk_size;
    require_indices(indices, C);
    const hsa_kernel* kernel = find_kernel(kOp, {q.shape[2], Hkv, D, chunk_size, K, off_by_one});
    const Tensor o = output(context, 0, "o", q.shape);
    if (o.elements() == 0) return;
    if (C == 0) {
      std::fill_n(static_cast<float*>(o.data), o.elements(), 0.0f);
      return;
    }
    void* const tensors[] = {q.data, k.data, v.data, indices.data, weights.data, o.data};
    const int64_t dims[] = {B, L, C};
    execute(kOp, kernel, tensors, dims, context);
  }

  static void require_indices(const Tensor& indices, int64_t C) {
    const int32_t* data = static_cast<const int32_t*>(indices.data);
    const int64_t n = indices.elements();
    if (n == 0) return;
    const auto [low, high] = std::minmax_element(data, data + n);
    require(-1 <= *low && *high < C, "hsa.ChunkAttention: indices must lie in -1 (empty) … " + std::to_string(C - 1) + ", found " +
                                         std::to_string(*low) + " … " + std::to_string(*high));
  }
};

// ------------------------------------------------------------------------------------------------- shape inference

int64_t attribute(const ort::InferContext* context, const char* name) {
  const ort::Attribute* found = nullptr;
  int64_t value = 0;
  size_t bytes = 0;
  check(api.ShapeInferContext_GetAttribute(context, name, &found));
  check(api.ReadOpAttr(found, ort::kAttributeInt, &value, sizeof value, &bytes));
  return value;
}

/* The dimensions of an input: false where ONNX Runtime does not know one, not even by name. To hand such a one on would
 * say that it is -1. */
bool known(const ort::TypeShape* info, int64_t* dims, const char** symbols) {
  size_t rank = 0;
  check(api.GetDimensionsCount(info, &rank));
  if (rank != kRank) return false;
  check(api.GetDimensions(info, dims, kRank));
  check(api.GetSymbolicDimensions(const_cast<ort::TypeShape*>(info), symbols, kRank));
  for (size_t i = 0; i < kRank; ++i)
    if (dims[i] < 0 && !*symbols[i]) return false;
  return true;
}

void infer(const Attention*, const ort::InferContext* context) {
  ort::TypeShape* q = nullptr;
  int64_t dims[kRank];
  const char* symbols[kRank];
  check(api.ShapeInferContext_GetInputTypeShape(context, 0, &q));
  if (known(q, dims, symbols)) check(api.ShapeInferContext_SetOutputTypeShape(context, 0, q));
}

void infer(const Select*, const ort::InferContext* context) {
  ort::TypeShape *q = nullptr, *result = nullptr;
  int64_t dims[kRank];
  const char* symbols[kRank];
  check(api.ShapeInferContext_GetInputTypeShape(context, 0, &q));
  if (!known(q, dims, symbols)) return;
  dims[2] = attribute(context, "kv_num_heads");
  dims[3] = attribute(context, "top_k");
  symbols[2] = symbols[3] = "";
  check(api.CreateTensorTypeAndShapeInfo(&result));
  const std::unique_ptr<ort::TypeShape, void (*)(ort::TypeShape*)> release(result, api.ReleaseTensorTypeAndShapeInfo);
  check(api.SetDimensions(result, dims, kRank));
  check(api.SetSymbolicDimensions(result, symbols, kRank));
  for (size_t i = 0; i < std::size(Select::kOutputs); ++i) {
    check(api.SetTensorElementType(result, Select::kOutputs[i]));
    check(api.ShapeInferContext_SetOutputTypeShape(context, i, result));
  }
}

// ---------------------------------------------------------------------------------------------------- registration

template <typename Op>
struct CustomOp : ort::CustomOp {
  CustomOp() : ort::CustomOp{} {
    version = ort::kApiVersion;
    GetName = [](const ort::CustomOp*) { return std::strchr(kOpNames[Op::kOp], '.') + 1; };
    GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
    GetInputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kInputs); };
    GetInputType = [](const ort::CustomOp*, size_t i) -> int { return Op::kInputs[i]; };
    GetOutputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kOutputs); };
    GetOutputType = [](const ort::CustomOp*, size_t i) -> int { return Op::kOutputs[i]; };
    GetInputCharacteristic = GetOutputCharacteristic = GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
    GetVariadicInputMinArity = GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 1; };
    GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
    GetStartVersion = [](const ort::CustomOp*) { return 1; };
    GetEndVersion = [](const ort::CustomOp*) { return 1; };
    CreateKernelV2 = [](const ort::CustomOp*, const void*, const ort::KernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new Op(info); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
    KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
      return guarded([&] { static_cast<const Op*>(kernel)->compute(context); });
    };
    InferOutputShapeFn = [](const ort::CustomOp*, ort::InferContext* context) {
      return guarded([&] { infer(static_cast<const Op*>(nullptr), context); });
    };
  }
};

void check_kernels() {
  for (int32_t i = 0; i < hsa_entry_count; ++i) {
    const hsa_kernel& kernel = *hsa_entries[i].kernel;
    const std::string which = std::string(kOpNames[hsa_entries[i].op]) + " " + describe(hsa_entries[i].op, hsa_entries[i].statics);
    require(kernel.abi == HSA_KERNEL_ABI, which + ": its kernel has interface " + std::to_string(kernel.abi) + ", not " +
                                              std::to_string(HSA_KERNEL_ABI) + "; build both anew");
    require(!std::strcmp(kernel.pass, "forward"), which + ": its kernel is of the " + kernel.pass + " pass; link the forward one");
  }
}

ort::CustomOpDomain* create_domain() {
  static const CustomOp<Select> select;
  static const CustomOp<Attention> attention;
  ort::CustomOpDomain* domain = nullptr;
  check(api.CreateCustomOpDomain("hsa", &domain));
  check(api.CustomOpDomain_Add(domain, &select));
  check(api.CustomOpDomain_Add(domain, &attention));
  return domain;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                const ort::ApiBase* base) {
  static const bool loaded = api.load(base);
  if (!loaded) {
    const void* slot = base->GetApi(1)[ort::kFirstSlot];
    const auto create = reinterpret_cast<decltype(ort::Api::CreateStatus)>(const_cast<void*>(slot));
    return create(ort::kFail, "the hsa operator library needs ONNX Runtime 1.17 or later");
  }
  return guarded([&] {
    check_kernels();
    static ort::CustomOpDomain* domain = create_domain();
    check(api.AddCustomOpDomain(options, domain));
  });
}
