// out[column] = sum over rows of float32 partial sums: the second half of every parameter gradient.
//
// A block takes 16 columns, so that BERT's widths give every multiprocessor a block. kVec columns a
// lane, its lanes reach over 16 columns of some rows; so many walkers (64 of 16 bytes) share the
// rows, each every 64th, and all loads of 8 of its rows are under way before the first is added.
// Kahan's compensation keeps the error independent of the number of rows. Then the walkers' sums
// are added, in a warp and over the warps. Fixed order: the same bits each run.
#include "device/earlier.cuh"
#include "device/vec.cuh"
#include "params.h"

namespace bertfast {
namespace {

constexpr int kColumns = 16;
constexpr int kWarps = 8;
constexpr int kAtOnce = 8;  // rows of a walker

// kVec: 4, or 1 where 16-byte accesses aren't possible.
template<class T, int kVec>
__global__ void __launch_bounds__(32 * kWarps, 4) column_sum_kernel(ColumnSum p) {
  await_earlier_kernels();
  constexpr int kLanes = kColumns / kVec;  // of a row
  constexpr int kWalkers = 32 * kWarps / kLanes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = blockIdx.x * kColumns + lane % kLanes * kVec;
  const int which = blockIdx.y;
  const unsigned rows = p.n_partials;
  const float* partial = p.partial + int64_t(which) * rows * p.cols + col;
  float total[kVec] = {}, lost[kVec] = {};

  // 1. a walker's rows
  if (col < p.cols) {
    for (unsigned first = threadIdx.x / kLanes; first < rows; first += kWalkers * kAtOnce) {
      Vec<float, kVec> bits[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned row = first + i * kWalkers;
        bits[i] = {};
        if (row < rows) bits[i] = Vec<float, kVec>::load(partial + int64_t(row) * p.cols);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const float value = bits[i][k] - lost[k];
          const float sum = total[k] + value;
          lost[k] = (sum - total[k]) - value;
          total[k] = sum;
        }
      }
    }
  }

  // 2. over the walkers of a warp, then over the warps
  const Shared<float> sums = shared_memory<float>(0);
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
#pragma unroll
    for (int offset = 16; offset >= kLanes; offset /= 2) {
      total[k] += __shfl_xor_sync(0xffffffffu, total[k], offset);
    }
    if (lane < kLanes) sums.store(warp * kColumns + lane * kVec + k, total[k]);
  }
  __syncthreads();
  const int own = blockIdx.x * kColumns + threadIdx.x;
  if (threadIdx.x < kColumns && own < p.cols) {
    float sum = sums.load(threadIdx.x);
    for (int other = 1; other < kWarps; ++other) sum += sums.load(other * kColumns + threadIdx.x);
    // An array among the parameters that is indexed at run time would be copied to the stack.
    void* out = which == 0 ? p.out[0] : which == 1 ? p.out[1] : p.out[2];
    static_cast<T*>(out)[own] = from_float<T>(sum);
  }
}

template<class T>
cudaError_t launch_for(const ColumnSum& p, Stream stream) {
  const dim3 grid((p.cols - 1) / kColumns + 1, p.sums);
  const bool wide = p.cols % 4 == 0 && is_aligned(p.partial);
  const auto kernel = wide ? column_sum_kernel<T, 4> : column_sum_kernel<T, 1>;
  constexpr int kBytes = kColumns * kWarps * sizeof(float);
  return launch_early(kernel, grid, dim3(32 * kWarps), kBytes, stream, p);
}

}  // namespace

cudaError_t launch_column_sum(const ColumnSum& p, DType dtype, Stream stream) {
  return dtype == DType::kFloat32   ? launch_for<float>(p, stream)
         : dtype == DType::kFloat16 ? launch_for<__half>(p, stream)
                                    : launch_for<__nv_bfloat16>(p, stream);
}

cudaError_t load_a_kernel() {
#ifdef BERTFAST_HOST
  return cudaSuccess;
#else
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, column_sum_kernel<float, 4>);
#endif
}

}  // namespace bertfast
