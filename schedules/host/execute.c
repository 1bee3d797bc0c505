/* Drives a kernel's stages on the host's threads; see kernel.h. */
#include "kernel.h"

#include <stdatomic.h>
#include <stdlib.h>

/* Units go out in blocks, about this many a thread, so that uneven units even out. */
enum { BLOCKS_A_THREAD = 8, ALIGNMENT = 64 };

typedef struct {
  const hsa_kernel* kernel;
  void* const* tensors;
  const int64_t* dims;
  char* scratch;
  char* workspaces;
  int64_t workspace_bytes, units, block;
  int32_t stage, threads;
  atomic_int_fast64_t next;
  atomic_int_fast32_t worker;
} job_t;

static void drain(void* argument) {
  job_t* job = argument;
  const int32_t worker = atomic_fetch_add(&job->worker, 1);
  if (worker >= job->threads) return; /* a workspace each */
  void* workspace = job->workspaces + worker * job->workspace_bytes;
  for (;;) {
    const int64_t begin = atomic_fetch_add(&job->next, job->block);
    if (begin >= job->units) return;
    const int64_t end = begin + job->block < job->units ? begin + job->block : job->units;
    job->kernel->run(job->stage, job->tensors, job->dims, job->scratch, workspace, begin, end);
  }
}

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

void hsa_parallel_openmp(void* host, void (*work)(void* job), void* job, int32_t threads) {
  ((void (*)(void (*)(void*), void*, unsigned, unsigned))host)(work, job, (unsigned)threads, 0);
}

void hsa_parallel_serial(void* host, void (*work)(void* job), void* job, int32_t threads) {
  (void)host, (void)threads;
  work(job);
}

int hsa_execute(const hsa_kernel* kernel, void* const* tensors, const int64_t* dims, int32_t threads,
                hsa_parallel parallel, void* host) {
  if (threads < 1) threads = 1;
  const int64_t scratch = aligned(kernel->scratch_bytes(dims)), workspace = aligned(kernel->workspace_bytes(dims));
  char* memory = aligned_alloc(ALIGNMENT, scratch + threads * workspace + ALIGNMENT);
  if (!memory) return 1;
  for (int32_t stage = 0; stage < kernel->stages; ++stage) {
    job_t job = {.kernel = kernel, .tensors = tensors, .dims = dims, .scratch = memory,
                 .workspaces = memory + scratch, .workspace_bytes = workspace,
                 .units = kernel->units(stage, dims), .stage = stage, .threads = threads};
    if (job.units <= 0) continue;
    job.block = job.units / ((int64_t)threads * BLOCKS_A_THREAD);
    if (job.block < 1) job.block = 1;
    if (threads == 1 || job.units == 1) drain(&job);
    else parallel(host, drain, &job, threads);
  }
  free(memory);
  return 0;
}
