// The description of a matrix in global memory by which bulk copies find boxes of it:
// device/tma.cuh.
//
// It is made on the host and reaches a kernel as a part of its parameters, which then have to be
// `const __grid_constant__`: a bulk copy reads it by its address.
#pragma once

#include <atomic>
#include <cstdint>

#include "device/cuda.cuh"

#ifdef BERTFAST_HOST
#include "host/bulk_copy.h"
#else
#include <cuda.h>
#endif

namespace bertfast {

// Boxes of 16-bit values, x first. A row of a box is one swizzled row of shared memory.
struct Boxes {
  const void* data;
  int sizes[3];        // values along x, rows along y, matrices along z
  int64_t strides[2];  // in values, along y and z
  int box[3];
};

// What CUDA asks of addresses, strides and boxes, and what a swizzled row can hold.
inline bool describes_boxes(const Boxes& of) {
  if (of.box[0] != 32 && of.box[0] != 64) return false;  // rows of 64 and 128 bytes
  if (of.data == nullptr || reinterpret_cast<uintptr_t>(of.data) % 16 != 0) return false;
  for (int i = 0; i < 3; ++i) {
    if (of.sizes[i] < 1 || of.box[i] < 1 || of.box[i] > 256) return false;
  }
  for (const int64_t stride : of.strides) {
    if (stride < 1 || stride % 8 != 0 || stride >= int64_t(1) << 39) return false;
  }
  return true;
}

#ifdef BERTFAST_HOST

using TensorMap = host::bulk_copy::TensorMap;

inline cudaError_t make_tensor_map(TensorMap* map, const Boxes& of) {
  if (!describes_boxes(of)) return cudaErrorInvalidValue;
  *map = {of.data,
          {of.sizes[0], of.sizes[1], of.sizes[2]},
          {2 * of.strides[0], 2 * of.strides[1]},
          {of.box[0], of.box[1], of.box[2]}};
  return cudaSuccess;
}

#else

using TensorMap = CUtensorMap;

#ifdef __CUDACC__

using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime, once: linking to the driver would keep the
// module from being imported where there is none.
inline cudaError_t tensor_map_encoder(TensorMapEncoder* function) {
  static std::atomic<TensorMapEncoder> known{nullptr};
  *function = known;
  if (*function != nullptr) return cudaSuccess;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  known = *function = reinterpret_cast<TensorMapEncoder>(found);
  return cudaSuccess;
}

// Outside of the matrix a box is zeros when it is loaded, and isn't stored.
inline cudaError_t make_tensor_map(TensorMap* map, const Boxes& of) {
  if (!describes_boxes(of)) return cudaErrorInvalidValue;
  TensorMapEncoder encode = nullptr;
  const cudaError_t error = tensor_map_encoder(&encode);
  if (error != cudaSuccess) return error;
  const cuuint64_t sizes[] = {cuuint64_t(of.sizes[0]), cuuint64_t(of.sizes[1]),
                              cuuint64_t(of.sizes[2])};
  const cuuint64_t strides[] = {cuuint64_t(2 * of.strides[0]), cuuint64_t(2 * of.strides[1])};
  const cuuint32_t box[] = {cuuint32_t(of.box[0]), cuuint32_t(of.box[1]), cuuint32_t(of.box[2])};
  const cuuint32_t dense[] = {1, 1, 1};
  const CUresult made =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(of.data), sizes, strides,
             box, dense, CU_TENSOR_MAP_INTERLEAVE_NONE,
             of.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif
#endif

}  // namespace bertfast
