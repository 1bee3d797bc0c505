/* The C interface of a compiled kernel: raw pointers, sizes, and a range of units of work, so that the host's own
 * threads drive it. It needs no compiler, no Python and no runtime library.
 *
 * A kernel runs in stages with a barrier between them. A stage is divided into independent units; run() computes the
 * units begin <= u < end of one stage. Tensors are contiguous, inputs first; dims are B, L, C.
 *
 *   chunk_attention  forward    q k v indices weights | o
 *                    backward   grad_o q k v indices weights | d_q d_k d_v d_weights
 *   chunk_select     forward    q_r landmark position chunks | indices scores
 *                    backward   grad_scores q_r landmark indices | d_q_r d_landmark
 *   sliding_window   forward    q k v past_k past_v position lengths | o present_k present_v
 *
 * Of a sliding window C is how many slots of a row's ring are written, from its newest key backwards: W, or min(L, W)
 * where present is past.
 */
#ifndef HSA_KERNEL_H
#define HSA_KERNEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HSA_KERNEL_ABI 1

typedef struct hsa_kernel {
  int32_t abi;         /* HSA_KERNEL_ABI of the build */
  const char* problem; /* the operator's static description, as JSON with sorted keys */
  const char* pass;    /* "forward" or "backward" */
  int32_t tensors;     /* how many pointers run() takes */
  int32_t stages;
  int64_t (*units)(int32_t stage, const int64_t* dims);
  int64_t (*scratch_bytes)(const int64_t* dims);   /* shared by all threads, lives through all stages */
  int64_t (*workspace_bytes)(const int64_t* dims); /* for each thread */
  void (*run)(int32_t stage, void* const* tensors, const int64_t* dims, void* scratch, void* workspace, int64_t begin,
              int64_t end);
} hsa_kernel;

/* Calls work(job) from up to `threads` threads at once, the caller's among them or not, and returns when all have
 * returned. `host` is whatever the host needs for that. Fewer calls than `threads` are fine, none is not. */
typedef void (*hsa_parallel)(void* host, void (*work)(void* job), void* job, int32_t threads);

/* An hsa_parallel for a process that has an OpenMP runtime: `host` is the address of its GOMP_parallel. */
void hsa_parallel_openmp(void* host, void (*work)(void* job), void* job, int32_t threads);

/* An hsa_parallel for the calling thread alone. */
void hsa_parallel_serial(void* host, void (*work)(void* job), void* job, int32_t threads);

/* Runs all stages. Returns 0, or 1 when memory ran out. */
int hsa_execute(const hsa_kernel* kernel, void* const* tensors, const int64_t* dims, int32_t threads,
                hsa_parallel parallel, void* host);

#ifdef __cplusplus
}
#endif
#endif
