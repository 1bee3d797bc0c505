/* What a built library carries: its kernels, for which problem, machine and length each was compiled. The tables are
 * generated. */
#ifndef HSA_LIBRARY_H
#define HSA_LIBRARY_H

#include "cuda_kernel.h"
#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The operators; kernels are compiled for problems of the first three, the others are whole in sample.* and fused.*. */
enum {
  HSA_CHUNK_SELECT,
  HSA_CHUNK_ATTENTION,
  HSA_SLIDING_WINDOW,
  HSA_SAMPLE,
  HSA_ADD_NORM,
  HSA_RMS_NORM,
  HSA_ROTARY_HEADS,
  HSA_SWIGLU,
  HSA_TAKE_ROWS
};
enum { HSA_STATICS = 6 };
enum { HSA_FLOAT32 = 0, HSA_FLOAT16 = 1, HSA_BFLOAT16 = 2, HSA_DTYPES = 3 };

/* A kind of machine. CPUs: level of x86-64, 0 for what runs on all machines of this library's kind. GPUs: capability is
 * 10*major + minor; exact if no other runs the code, else later minor versions do, too. */
typedef struct hsa_target {
  const char* name;
  int32_t gpu, level, capability, exact;
} hsa_target;

/* statics: chunk_select     kv_heads retrieval_heads retrieval_dim chunk_size top_k window
 *          chunk_attention  q_heads  kv_heads        head_dim      chunk_size top_k off_by_one
 *          sliding_window   q_heads  kv_heads        head_dim      window     0     0
 * Of the entries that fit, the first whose target is this machine's and whose length is not above the segment's serves. */
typedef struct hsa_entry {
  int32_t op, dtype;
  int64_t statics[HSA_STATICS];
  float scale;    /* of the logits; 0: by the operator's default */
  int32_t target; /* index */
  int64_t length; /* least tokens of a segment */
  const hsa_kernel* cpu;
  const hsa_cuda_kernel* gpu;
} hsa_entry;

extern const hsa_target hsa_targets[];
extern const int32_t hsa_target_count;
extern const hsa_entry hsa_entries[];
extern const int32_t hsa_entry_count;

/* Of plain.cu and sample.cu, in libraries with GPU kernels. Results are 0 or an error of CUDA's. */
int32_t hsa_plain_run(int32_t op, int32_t dtype, const int64_t* statics, float scale, void* const* tensors,
                      const int64_t* dims, void* stream);
int32_t hsa_gpu_sample(void* const* tensors, const int64_t* dims, void* stream);
int32_t hsa_gpu_capability(int32_t* capability);
int32_t hsa_gpu_fill(void* data, int32_t byte, int64_t bytes, void* stream);
const char* hsa_gpu_message(int32_t error);

#ifdef __cplusplus
}
#endif
#endif
