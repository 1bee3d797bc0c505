/* What the launchers of one library share: index arithmetic, and tensor maps without linking to the driver. */
#ifndef HSA_CUDA_LAUNCH_H
#define HSA_CUDA_LAUNCH_H

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

/* Errors of ours, apart from CUDA's own. */
enum { HSA_NO_TENSOR_MAP = -1, HSA_BAD_TENSOR_MAP = -2 };

static inline int64_t hsa_floordiv(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
static inline int64_t hsa_floormod(int64_t a, int64_t b) { return a - b * hsa_floordiv(a, b); }
static inline int64_t hsa_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t hsa_max(int64_t a, int64_t b) { return a < b ? b : a; }

/* An empty tensor has no address that a tensor map would take, and nothing is loaded through it: scratch stands in. */
static inline int hsa_tensor_map(CUtensorMap* map, int type, int rank, void* address, void* scratch,
                                 const int64_t* dims, const int64_t* strides, const int64_t* box, const int64_t* steps,
                                 int interleave, int swizzle, int promotion, int fill) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (!encode) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) !=
            cudaSuccess || !entry)
      return HSA_NO_TENSOR_MAP;
    encode = reinterpret_cast<decltype(encode)>(entry);
  }
  cuuint64_t dim[5], stride[5];
  cuuint32_t extent[5], step[5];
  if (!address) address = scratch;
  for (int i = 0; i < rank; ++i) {
    if (dims[i] == 0) address = scratch;
    dim[i] = dims[i] ? dims[i] : 1;
    stride[i] = strides[i] ? strides[i] : 16;
    extent[i] = box[i];
    step[i] = steps[i];
  }
  const CUresult result = encode(map, (CUtensorMapDataType)type, rank, address, dim, stride + 1, extent, step,
                                 (CUtensorMapInterleave)interleave, (CUtensorMapSwizzle)swizzle,
                                 (CUtensorMapL2promotion)promotion, (CUtensorMapFloatOOBfill)fill);
  return result == CUDA_SUCCESS ? 0 : HSA_BAD_TENSOR_MAP;
}

#endif
