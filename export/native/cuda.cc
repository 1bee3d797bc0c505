/* The CUDA provider: compiled kernels on ONNX Runtime's stream, with scratch of its allocator; nothing waits for the
 * device, so that calls can be captured in a CUDA graph. What no compiled kernel serves, plain.cu does; fused.cu has the
 * operators that no kernel is compiled for. */
#include "support.h"

namespace hsa {
namespace {

/* Of the current device, which ONNX Runtime sets before it computes. */
int32_t capability() {
  int32_t found = 0;
  const int32_t error = hsa_gpu_capability(&found);
  if (error) refuse(std::string("hsa: no GPU to compute on: ") + hsa_gpu_message(error), ort::kFail);
  return found;
}

bool runs_on(const hsa_target& target, int32_t device) {
  if (target.exact) return device == target.capability;
  return device / 10 == target.capability / 10 && device >= target.capability;
}

void require_target(int32_t op, int32_t device) {
  std::string known;
  for (int32_t i = 0; i < hsa_target_count; ++i) {
    if (!hsa_targets[i].gpu) continue;
    if (runs_on(hsa_targets[i], device)) return;
    known += std::string(known.empty() ? "" : ", ") + hsa_targets[i].name;
  }
  require(false,
          std::string(kOpNames[op]) + ": this GPU has compute capability " + std::to_string(device / 10) + "." +
              std::to_string(device % 10) + ", and the library was built for " + known +
              ". Build it for this GPU, or run the model without it: its own functions do it.",
          ort::kNotImplemented);
}

const hsa_cuda_kernel* find_kernel(const Call& call, int32_t device) {
  for (int32_t i = 0; i < hsa_entry_count; ++i) {
    const hsa_entry& entry = hsa_entries[i];
    if (entry.gpu && same_problem(entry, call.problem) && entry.length <= call.dims[1] &&
        runs_on(hsa_targets[entry.target], device))
      return entry.gpu;
  }
  return nullptr;
}

/* Device memory that whatever follows on the stream may use again. */
class Scratch {
 public:
  Scratch(ort::KernelContext* context, const ort::MemoryInfo* memory, int64_t bytes) {
    check(api.KernelContext_GetAllocator(context, memory, &allocator_));
    data_ = allocator_->Alloc(allocator_, bytes + kAlignment);
    if (!data_) api.ReleaseAllocator(allocator_);
    require(data_, "hsa: no memory for " + std::to_string(bytes) + " bytes of scratch on the GPU", ort::kFail);
  }
  ~Scratch() {
    allocator_->Free(allocator_, data_);
    api.ReleaseAllocator(allocator_);
  }
  Scratch(const Scratch&) = delete;
  void* aligned() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data_) + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr int64_t kAlignment = 256;
  ort::Allocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

void* stream_of(ort::KernelContext* context) {
  void* stream = nullptr;
  check(api.KernelContext_GetGPUComputeStream(context, &stream));
  return stream;
}

/* Compiled kernels load 16 bytes at a time; ONNX Runtime aligns to 256, but a view of a user's may begin anywhere. */
bool aligned(const Call& call) {
  for (const void* tensor : call.tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % 16) return false;
  return true;
}

}  // namespace

bool Cuda::serves(int32_t, int32_t) { return true; }

void Cuda::fill(void* data, int32_t byte, int64_t bytes, ort::KernelContext* context) {
  const int32_t error = hsa_gpu_fill(data, byte, bytes, stream_of(context));
  require(!error, std::string("hsa: ") + hsa_gpu_message(error), ort::kFail);
}

void Cuda::run(const Call& call, ort::KernelContext* context) {
  const Problem& problem = call.problem;
  const int32_t device = capability();
  require_target(problem.op, device);
  void* const stream = stream_of(context);
  void* const* tensors = call.tensors.data();
  const hsa_cuda_kernel* kernel = aligned(call) ? find_kernel(call, device) : nullptr;
  const char* message = nullptr;
  if (!kernel) {
    const int32_t error =
        problem.op == HSA_SAMPLE
            ? hsa_gpu_sample(tensors, call.dims, stream)
            : hsa_plain_run(problem.op, problem.dtype, problem.statics.data(), problem.scale, tensors, call.dims, stream);
    if (error) message = hsa_gpu_message(error);
  } else {
    const Scratch scratch(context, call.memory, kernel->scratch_bytes(call.dims));
    if (const int32_t error = kernel->run(tensors, call.dims, scratch.aligned(), stream)) message = kernel->message(error);
  }
  if (message) refuse(std::string(kOpNames[problem.op]) + " " + describe(problem) + ": " + message, ort::kFail);
}

void Cuda::run(const hsa_pass& pass, ort::KernelContext* context) {
  require_target(pass.op, capability());
  const int32_t error = hsa_gpu_pass(&pass, stream_of(context));
  if (error) refuse(std::string(kOpNames[pass.op]) + ": " + hsa_gpu_message(error), ort::kFail);
}

}  // namespace hsa
