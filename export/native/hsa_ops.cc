/* Registers the operators of domain hsa with ONNX Runtime: for its CPU provider those that the library has kernels for and
 * those that need none; for its CUDA provider, where the library was built with it, all of them. */
#include <iterator>

#include "fused_ops.h"
#include "operators.h"

namespace hsa {

ort::Api api;

namespace {

constexpr const char* kStaticNames[][HSA_STATICS] = {
    {"kv_heads", "retrieval_heads", "retrieval_dim", "chunk_size", "top_k", "window"},
    {"q_heads", "kv_heads", "head_dim", "chunk_size", "top_k", "off_by_one"},
    {"q_heads", "kv_heads", "head_dim", "window", nullptr, nullptr},
    {"vocabulary", nullptr, nullptr, nullptr, nullptr, nullptr}};
constexpr ort::Element kElements[HSA_DTYPES] = {ort::kFloat, ort::kFloat16, ort::kBFloat16};

Problem problem_of(const hsa_entry& entry) {
  Problem problem{entry.op, entry.dtype, {}, entry.scale};
  std::copy_n(entry.statics, HSA_STATICS, problem.statics.begin());
  return problem;
}

}  // namespace

std::string describe(const Problem& problem) {
  std::string text;
  for (int i = 0; i < HSA_STATICS && kStaticNames[problem.op][i]; ++i)
    text += std::string(kStaticNames[problem.op][i]) + "=" + std::to_string(problem.statics[i]) + " ";
  if (problem.scale) text += "scale=" + std::to_string(problem.scale) + " ";
  return text + kDtypeNames[problem.dtype];
}

bool same_problem(const hsa_entry& entry, const Problem& problem) {
  return entry.op == problem.op && entry.dtype == problem.dtype && entry.scale == problem.scale &&
         std::equal(problem.statics.begin(), problem.statics.end(), entry.statics);
}

void raise_no_kernel(const Problem& problem, bool gpu, const std::string& machine) {
  std::string known;
  for (int32_t i = 0; i < hsa_entry_count; ++i)
    if (hsa_entries[i].op == problem.op && (hsa_entries[i].gpu != nullptr) == gpu)
      known += (known.empty() ? "" : "; ") + describe(problem_of(hsa_entries[i]));
  require(false,
          std::string(kOpNames[problem.op]) + ": no kernel for " + describe(problem) + " on " + machine + "; this library has: " +
              (known.empty() ? "none" : known) +
              ". Build the library for this problem, or run the model without it: its own functions do it.",
          ort::kNotImplemented);
  throw Raised{nullptr};
}

namespace {

// ------------------------------------------------------------------------------------------------- shape inference

int64_t attribute(const ort::InferContext* context, const char* name) {
  const ort::Attribute* found = nullptr;
  int64_t value = 0;
  size_t bytes = 0;
  check(api.ShapeInferContext_GetAttribute(context, name, &found));
  check(api.ReadOpAttr(found, ort::kAttributeInt, &value, sizeof value, &bytes));
  return value;
}

/* A shape, whose dimensions are numbers or names, and the type of the elements. */
struct Shape {
  std::vector<int64_t> dims;
  std::vector<const char*> symbols;
  int element = 0;

  /* The shape of an input: false where ONNX Runtime does not know one, not even by name. To hand such a one on would say
   * that it is -1. */
  bool read(const ort::InferContext* context, size_t from) {
    ort::TypeShape* info = nullptr;
    size_t rank = 0;
    check(api.ShapeInferContext_GetInputTypeShape(context, from, &info));
    check(api.GetDimensionsCount(info, &rank));
    dims.resize(rank), symbols.resize(rank);
    check(api.GetTensorElementType(info, &element));
    check(api.GetDimensions(info, dims.data(), rank));
    check(api.GetSymbolicDimensions(info, symbols.data(), rank));
    for (size_t i = 0; i < rank; ++i)
      if (dims[i] < 0 && !*symbols[i]) return false;
    return rank > 0;
  }

  void set(size_t i, int64_t dim) { dims[i] = dim, symbols[i] = ""; }

  void write(ort::InferContext* context, size_t to) {
    ort::TypeShape* result = nullptr;
    check(api.CreateTensorTypeAndShapeInfo(&result));
    const std::unique_ptr<ort::TypeShape, void (*)(ort::TypeShape*)> release(result, api.ReleaseTensorTypeAndShapeInfo);
    check(api.SetDimensions(result, dims.data(), dims.size()));
    check(api.SetSymbolicDimensions(result, symbols.data(), symbols.size()));
    check(api.SetTensorElementType(result, element));
    check(api.ShapeInferContext_SetOutputTypeShape(context, to, result));
  }
};

/* The output has the input's shape and type. */
void infer_like(ort::InferContext* context, size_t from, size_t to) {
  ort::TypeShape* shape = nullptr;
  check(api.ShapeInferContext_GetInputTypeShape(context, from, &shape));
  if (Shape().read(context, from)) check(api.ShapeInferContext_SetOutputTypeShape(context, to, shape));
}

void infer(const Attention*, ort::InferContext* context) { infer_like(context, 0, 0); }

void infer(const Window*, ort::InferContext* context) {
  infer_like(context, 0, 0);
  infer_like(context, 3, 1);
  infer_like(context, 4, 2);
}

void infer(const Select*, ort::InferContext* context) {
  Shape shape;
  if (!shape.read(context, 0) || shape.dims.size() != kRank) return;
  shape.set(2, attribute(context, "kv_num_heads"));
  shape.set(3, attribute(context, "top_k"));
  for (size_t i = 0; i < std::size(Select::kOutputs); ++i) {
    shape.element = Select::kOutputs[i];
    shape.write(context, i);
  }
}

void infer(const AddNorm*, ort::InferContext* context) {
  infer_like(context, 0, 0);
  infer_like(context, 0, 1);
}

void infer(const RmsNorm*, ort::InferContext* context) { infer_like(context, 0, 0); }

void infer(const SwiGlu*, ort::InferContext* context) {
  Shape shape;
  if (!shape.read(context, 0) || shape.dims.back() < 0) return;
  shape.set(shape.dims.size() - 1, shape.dims.back() / 2);
  shape.write(context, 0);
}

void infer(const TakeRows*, ort::InferContext* context) {
  Shape shape, index;
  if (!shape.read(context, 0) || !index.read(context, 1) || shape.dims.size() < 2) return;
  const size_t rows = shape.dims.size() - 2;
  shape.dims.erase(shape.dims.begin() + rows), shape.symbols.erase(shape.symbols.begin() + rows);
  shape.dims.insert(shape.dims.begin() + rows, index.dims.begin(), index.dims.end());
  shape.symbols.insert(shape.symbols.begin() + rows, index.symbols.begin(), index.symbols.end());
  shape.write(context, 0);
}

void infer(const RotaryHeads*, ort::InferContext* context) {
  Shape shape;
  if (!shape.read(context, 0) || shape.dims.size() != 3 || shape.dims[2] < 0) return;
  const int64_t heads[] = {attribute(context, "num_heads"), attribute(context, "kv_num_heads")};
  shape.dims.push_back(shape.dims[2] / (heads[0] + 2 * heads[1]));
  shape.symbols.push_back("");
  for (size_t i = 0; i < 3; ++i) {
    shape.set(2, heads[i ? 1 : 0]);
    shape.write(context, i);
  }
}

void infer(const Sample*, ort::InferContext* context) {
  Shape shape;
  if (!shape.read(context, 0) || shape.dims.size() != 3) return;
  shape.dims.pop_back(), shape.symbols.pop_back();
  shape.element = ort::kInt64;
  shape.write(context, 0);
}

// ---------------------------------------------------------------------------------------------------- registration

template <typename Op, typename Provider, int32_t Dtype>
struct CustomOp : ort::CustomOp {
  static int type(ort::Element element) { return element == kT ? kElements[Dtype] : element; }

  CustomOp() : ort::CustomOp{} {
    version = ort::kApiVersion;
    GetName = [](const ort::CustomOp*) { return std::strchr(kOpNames[Op::kOp], '.') + 1; };
    GetExecutionProviderType = [](const ort::CustomOp*) { return Provider::kProvider; };
    GetInputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kInputs); };
    GetInputType = [](const ort::CustomOp*, size_t i) { return type(Op::kInputs[i]); };
    GetOutputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kOutputs); };
    GetOutputType = [](const ort::CustomOp*, size_t i) { return type(Op::kOutputs[i]); };
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
      return guarded([&] { static_cast<const Op*>(kernel)->template compute<Provider>(context, Dtype); });
    };
    InferOutputShapeFn = [](const ort::CustomOp*, ort::InferContext* context) {
      return guarded([&] { infer(static_cast<const Op*>(nullptr), context); });
    };
  }
};

template <typename Op, typename Provider, int32_t Dtype>
void add(ort::CustomOpDomain* domain) {
  static const CustomOp<Op, Provider, Dtype> op;
  if (Provider::serves(Op::kOp, Dtype)) check(api.CustomOpDomain_Add(domain, &op));
}

template <typename Op, typename Provider>
void add_all(ort::CustomOpDomain* domain) {
  add<Op, Provider, HSA_FLOAT32>(domain);
  add<Op, Provider, HSA_FLOAT16>(domain);
  add<Op, Provider, HSA_BFLOAT16>(domain);
}

void check_kernels() {
  for (int32_t i = 0; i < hsa_entry_count; ++i) {
    const hsa_entry& entry = hsa_entries[i];
    const std::string which = std::string(kOpNames[entry.op]) + " " + describe(problem_of(entry));
    const int32_t abi = entry.cpu ? entry.cpu->abi : entry.gpu->abi, own = entry.cpu ? HSA_KERNEL_ABI : HSA_CUDA_KERNEL_ABI;
    const char* pass = entry.cpu ? entry.cpu->pass : entry.gpu->pass;
    require(abi == own, which + ": its kernel has interface " + std::to_string(abi) + ", not " + std::to_string(own) +
                            "; build both anew");
    require(!std::strcmp(pass, "forward"), which + ": its kernel is of the " + pass + " pass; link the forward one");
  }
}

template <typename Provider, typename... Ops>
void add_each(ort::CustomOpDomain* domain) {
  (add_all<Ops, Provider>(domain), ...);
}

template <typename Provider>
void add_operators(ort::CustomOpDomain* domain) {
  add_each<Provider, Select, Attention, Window, AddNorm, RmsNorm, RotaryHeads, SwiGlu, TakeRows>(domain);
  add<Sample, Provider, HSA_FLOAT32>(domain);
}

ort::CustomOpDomain* create_domain() {
  ort::CustomOpDomain* domain = nullptr;
  check(api.CreateCustomOpDomain("hsa", &domain));
  add_operators<Cpu>(domain);
#ifdef HSA_CUDA
  add_operators<Cuda>(domain);
#endif
  return domain;
}

}  // namespace
}  // namespace hsa

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                const ort::ApiBase* base) {
  using hsa::api;
  static const bool loaded = api.load(base);
  if (!loaded) {
    const void* slot = base->GetApi(1)[ort::kFirstSlot];
    const auto create = reinterpret_cast<decltype(ort::Api::CreateStatus)>(const_cast<void*>(slot));
    return create(ort::kFail, "the hsa operator library needs ONNX Runtime 1.17 or later");
  }
  return hsa::guarded([&] {
    hsa::check_kernels();
    static ort::CustomOpDomain* domain = hsa::create_domain();
    hsa::check(api.AddCustomOpDomain(options, domain));
  });
}
