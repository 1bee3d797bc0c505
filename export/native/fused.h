/* What stands between a model's matrix products, each in one pass over memory: what is to be computed, and who does. */
#ifndef HSA_FUSED_H
#define HSA_FUSED_H

#include "library.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { HSA_PASS_TENSORS = 8 };

/* Sizes and, in the order of the operator's inputs and outputs, tensors; NULL where there are fewer.
 *
 * add_norm      x [rows, width], added [rows, width], weight [width]; sum, normed [rows, width]
 * rms_norm      x [rows, width], NULL, weight [width]; NULL, normed [rows, width]
 * rotary_heads  qkv [rows, (q_heads + 2 kv_heads) * width], q_weight, k_weight [width], float cos, sin [angles, width / 2];
 *               q [rows, q_heads, width], k, v [rows, kv_heads, width]. Row r takes angle r modulo angles.
 * swiglu        gate_up [rows, 2 width]; o [rows, width]
 * take_rows     x [rows / indices, table, width], int64 index [indices]; taken [rows, width] */
typedef struct hsa_pass {
  int32_t op, dtype;
  int64_t rows, width;
  float epsilon;
  int32_t normalize;
  int64_t q_heads, kv_heads, angles;
  int64_t indices, table;
  void* tensors[HSA_PASS_TENSORS];
} hsa_pass;

/* Of fused.cu, in libraries with GPU kernels: 0 or an error of CUDA's. */
int32_t hsa_gpu_pass(const hsa_pass* pass, void* stream);

/* Of fused.cc: rows begin … end - 1. */
void hsa_cpu_pass(const hsa_pass* pass, int64_t begin, int64_t end);

#ifdef __cplusplus
}
#endif
#endif
