// out[column] = sum over rows of float32 partial sums: the second half of every parameter gradient.
//
// A block takes 32 columns; its 8 warps take every 8th row each, then one adds the eight in order.
// Kahan's compensation keeps the error independent of the number of rows. Fixed order: the same
// bits each run.
#include "device/vec.cuh"
#include "params.h"

namespace bertfast {
namespace {

constexpr int kColumns = 32;
constexpr int kWarps = 8;

template<class T>
__global__ void __launch_bounds__(kColumns* kWarps) column_sum_kernel(ColumnSum p) {
  const int lane = threadIdx.x % kColumns, warp = threadIdx.x / kColumns;
  const int col = blockIdx.x * kColumns + lane;
  const int which = blockIdx.y;
  const float* partial = p.partial + int64_t(which) * p.n_partials * p.cols;
  float total = 0.f, lost = 0.f;
  if (col < p.cols) {
    for (int row = warp; row < p.n_partials; row += kWarps) {
      const float value = partial[int64_t(row) * p.cols + col] - lost;
      const float sum = total + value;
      lost = (sum - total) - value;
      total = sum;
    }
  }
  const Shared<float> sums = shared_memory<float>(0);
  sums.store(threadIdx.x, total);
  __syncthreads();
  if (warp == 0 && col < p.cols) {
    for (int other = 1; other < kWarps; ++other) total += sums.load(other * kColumns + lane);
    // An array among the parameters that is indexed at run time would be copied to the stack.
    void* out = which == 0 ? p.out[0] : which == 1 ? p.out[1] : p.out[2];
    static_cast<T*>(out)[col] = from_float<T>(total);
  }
}

}  // namespace

cudaError_t launch_column_sum(const ColumnSum& p, DType dtype, Stream stream) {
  const dim3 grid((p.cols + kColumns - 1) / kColumns, p.sums);
  const auto kernel = dtype == DType::kFloat32   ? column_sum_kernel<float>
                      : dtype == DType::kFloat16 ? column_sum_kernel<__half>
                                                 : column_sum_kernel<__nv_bfloat16>;
  constexpr int kBytes = kColumns * kWarps * sizeof(float);
  return launch(kernel, grid, dim3(kColumns * kWarps), kBytes, stream, p);
}

cudaError_t load_a_kernel() {
#ifdef BERTFAST_HOST
  return cudaSuccess;
#else
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, column_sum_kernel<float>);
#endif
}

}  // namespace bertfast
