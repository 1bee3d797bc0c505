/* What a built library carries: its kernels, and the problem that each was compiled for. The table is generated. */
#ifndef HSA_LIBRARY_H
#define HSA_LIBRARY_H

#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { HSA_CHUNK_SELECT = 0, HSA_CHUNK_ATTENTION = 1, HSA_STATICS = 6 };

/* statics: chunk_select     kv_heads retrieval_heads retrieval_dim chunk_size top_k window
 *          chunk_attention  q_heads  kv_heads        head_dim      chunk_size top_k off_by_one */
typedef struct hsa_entry {
  int32_t op;
  int64_t statics[HSA_STATICS];
  const hsa_kernel* kernel; /* forward, float32 */
} hsa_entry;

extern const hsa_entry hsa_entries[];
extern const int32_t hsa_entry_count;

#ifdef __cplusplus
}
#endif
#endif
