/* The subset of the ONNX Runtime C interface that the operator library uses, declared by hand: no wheel ships the
 * headers. The interface only grows, so a slot stays where it is; a test compares these with the official headers.
 */
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;  // ONNX Runtime 1.17, the first with everything below
constexpr int kFirstSlot = 0;         // CreateStatus, in every version

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TypeShape;
struct InferContext;
struct Attribute;
struct MemoryInfo;

struct Allocator {
  uint32_t version;
  void* (*Alloc)(Allocator*, size_t);
  void (*Free)(Allocator*, void*);
  const MemoryInfo* (*Info)(const Allocator*);
};

struct ApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum Element : int { kFloat = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Code : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum AttributeType : int { kAttributeInt = 1 };

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, InferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "layout of OrtCustomOp");

/* slot, name, result, arguments */
#define ORT_FUNCTIONS(X)                                                                              \
  X(0, CreateStatus, Status*, (int, const char*))                                                     \
  X(26, CreateCustomOpDomain, Status*, (const char*, CustomOpDomain**))                               \
  X(27, CustomOpDomain_Add, Status*, (CustomOpDomain*, const CustomOp*))                              \
  X(28, AddCustomOpDomain, Status*, (SessionOptions*, CustomOpDomain*))                               \
  X(51, GetTensorMutableData, Status*, (Value*, void**))                                              \
  X(57, CreateTensorTypeAndShapeInfo, Status*, (TypeShape**))                                         \
  X(58, SetTensorElementType, Status*, (TypeShape*, int))                                             \
  X(59, SetDimensions, Status*, (TypeShape*, const int64_t*, size_t))                                 \
  X(60, GetTensorElementType, Status*, (const TypeShape*, int*))                                      \
  X(61, GetDimensionsCount, Status*, (const TypeShape*, size_t*))                                     \
  X(62, GetDimensions, Status*, (const TypeShape*, int64_t*, size_t))                                 \
  X(63, GetSymbolicDimensions, Status*, (const TypeShape*, const char**, size_t))                     \
  X(65, GetTensorTypeAndShape, Status*, (const Value*, TypeShape**))                                  \
  X(85, KernelInfoGetAttribute_float, Status*, (const KernelInfo*, const char*, float*))              \
  X(86, KernelInfoGetAttribute_int64, Status*, (const KernelInfo*, const char*, int64_t*))            \
  X(90, KernelContext_GetInput, Status*, (const KernelContext*, size_t, const Value**))               \
  X(91, KernelContext_GetOutput, Status*, (KernelContext*, size_t, const int64_t*, size_t, Value**))  \
  X(93, ReleaseStatus, void, (Status*))                                                               \
  X(99, ReleaseTensorTypeAndShapeInfo, void, (TypeShape*))                                            \
  X(132, ReleaseAllocator, void, (Allocator*))                                                        \
  X(193, KernelContext_GetGPUComputeStream, Status*, (const KernelContext*, void**))                  \
  X(194, GetTensorMemoryInfo, Status*, (const Value*, const MemoryInfo**))                            \
  X(253, KernelContext_GetAllocator, Status*, (const KernelContext*, const MemoryInfo*, Allocator**)) \
  X(268, ShapeInferContext_GetInputTypeShape, Status*, (const InferContext*, size_t, TypeShape**))    \
  X(269, ShapeInferContext_GetAttribute, Status*, (const InferContext*, const char*, const Attribute**)) \
  X(270, ShapeInferContext_SetOutputTypeShape, Status*, (const InferContext*, size_t, const TypeShape*)) \
  X(271, SetSymbolicDimensions, Status*, (TypeShape*, const char**, size_t))                          \
  X(272, ReadOpAttr, Status*, (const Attribute*, int, void*, size_t, size_t*))                        \
  X(274, KernelContext_ParallelFor, Status*, (const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*))

struct Api {
#define X(slot, name, result, arguments) result(*name) arguments = nullptr;
  ORT_FUNCTIONS(X)
#undef X

  /* False when the runtime is older than kApiVersion. */
  bool load(const ApiBase* base) {
    const void* const* table = base->GetApi(kApiVersion);
    if (!table) return false;
#define X(slot, name, result, arguments) name = reinterpret_cast<result(*) arguments>(const_cast<void*>(table[slot]));
    ORT_FUNCTIONS(X)
#undef X
    return true;
  }
};

}  // namespace ort
