/* The CPU provider: compiled kernels on ONNX Runtime's own threads. */
#include <algorithm>
#include <thread>

#include "sample.h"
#include "support.h"

namespace hsa {
namespace {

bool runs_here(const hsa_target& target) {
  if (target.gpu) return false;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (target.level >= 4 && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl")))
    return false;
  if (target.level >= 3 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")))
    return false;
#endif
  return true;
}

const hsa_kernel* find_kernel(const Call& call) {
  std::string elsewhere;
  for (int32_t i = 0; i < hsa_entry_count; ++i) {
    const hsa_entry& entry = hsa_entries[i];
    const hsa_target& target = hsa_targets[entry.target];
    if (!entry.cpu || !same_problem(entry, call.problem) || entry.length > call.dims[1]) continue;
    if (runs_here(target)) return entry.cpu;
    elsewhere += std::string(elsewhere.empty() ? "" : ", ") + target.name;
  }
  require(elsewhere.empty(), std::string(kOpNames[call.problem.op]) + ": this CPU runs none of " + elsewhere +
                                 ", for which the library was built. Build it for this machine, too.",
          ort::kNotImplemented);
  raise_no_kernel(call.problem, false, "CPUs");
}

/* Of passes over rows: below, one thread is as fast as several. */
constexpr int64_t kElementsATask = 1 << 14, kTasksAThread = 4;

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

/* A team of one (sample.h). */
struct Alone {
  uint64_t bins[kBins];
  int64_t found = 0;

  int rank() const { return 0; }
  int size() const { return 1; }
  void sync() const {}
  void add(uint64_t* sum, uint64_t x) const { *sum += x; }
  uint64_t most(uint64_t x) const { return x; }
  uint64_t before(uint64_t) const { return 0; }
  uint64_t sum(uint64_t x) const { return x; }
};

void sample(const Call& call) {
  const auto of = [&](int i) { return static_cast<const float*>(call.tensors[i]); };
  const int64_t w = call.dims[1], V = call.dims[2];
  Alone team;
  for (int64_t row = 0; row < call.dims[0] * w; ++row)
    static_cast<int64_t*>(call.tensors[4])[row] =
        choose(team, of(0) + row * V, V, of(1)[row / w], of(2)[row / w], of(3)[row / w]);
}

}  // namespace

bool Cpu::serves(int32_t op, int32_t dtype) {
  return op > HSA_SLIDING_WINDOW || std::any_of(hsa_entries, hsa_entries + hsa_entry_count,
                     [&](const hsa_entry& entry) { return entry.cpu && entry.op == op && entry.dtype == dtype; });
}

void Cpu::fill(void* data, int32_t byte, int64_t bytes, ort::KernelContext*) { std::memset(data, byte, bytes); }

void Cpu::run(const Call& call, ort::KernelContext* context) {
  if (call.problem.op == HSA_SAMPLE) return sample(call);
  const int failed = hsa_execute(find_kernel(call), call.tensors.data(), call.dims, thread_count(), parallel, context);
  if (failed) refuse(std::string(kOpNames[call.problem.op]) + ": out of memory", ort::kFail);
}

void Cpu::run(const hsa_pass& pass, ort::KernelContext* context) {
  const int64_t elements = pass.rows * pass.width * (pass.op == HSA_ROTARY_HEADS ? pass.q_heads + 2 * pass.kv_heads : 1);
  const int64_t parts = std::min({pass.rows, elements / kElementsATask, int64_t(thread_count()) * kTasksAThread});
  if (parts < 2) return hsa_cpu_pass(&pass, 0, pass.rows);
  struct Job {
    const hsa_pass& pass;
    int64_t parts;
  } job{pass, parts};
  const auto part = [](void* argument, size_t i) {
    const Job& job = *static_cast<const Job*>(argument);
    hsa_cpu_pass(&job.pass, job.pass.rows * i / job.parts, job.pass.rows * (i + 1) / job.parts);
  };
  check(api.KernelContext_ParallelFor(context, part, parts, 0, &job));
}

}  // namespace hsa
