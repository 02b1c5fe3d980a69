// How threads share a row, and what is done to the values that each of them holds.
#pragma once

#include "device/philox.cuh"

namespace bertfast {

// kFull: the rows fill it (and in the forward, x_bias and residual are given), which leaves no
// branch.
template<int kVecColumns, int kPerThreadVectors, int kRowThreads, bool kIsFull = false,
         int kBlockThreads = kRowThreads <= 32 ? 128 : kRowThreads>
struct Split {
  static constexpr bool kFull = kIsFull;
  static constexpr int kVec = kVecColumns;
  static constexpr int kPerThread = kPerThreadVectors;
  static constexpr int kThreads = kRowThreads;
  static constexpr int kBlock = kBlockThreads;
  static constexpr int kRows = kBlock / kThreads;  // rows of a block at a time
  static constexpr int kCols = kVec * kPerThread * kThreads;

  static __device__ __forceinline__ int lane() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ int group() { return threadIdx.x / kThreads; }
  // A thread's columns: kVec from first(), then again every kStep.
  static constexpr int kStep = kThreads * kVec;
  static __device__ __forceinline__ int first() { return lane() * kVec; }
  static __device__ __forceinline__ int col(int j) { return first() + j * kStep; }
};

// Shared memory of two sums over a row's warps.
template<class S>
constexpr int kReduceBytes = S::kThreads > 32 ? 2 * S::kBlock / 32 * sizeof(float) : 0;

// values = dropout(values); what is dropped may be Inf or NaN and must not survive, so it is
// chosen, not multiplied.
template<int kVec>
__device__ __forceinline__ void drop(float (&values)[kVec], const RowDropout& dropout, int64_t row,
                                     int col, float keep_scale) {
  bool keep[kVec];
  dropout.keep<kVec>(row, col, keep);
#pragma unroll
  for (int k = 0; k < kVec; ++k) values[k] = keep[k] ? values[k] * keep_scale : 0.f;
}

// sum / cols, rounded once: of a constant row nothing may remain when its mean is subtracted.
__device__ __forceinline__ float row_mean(float sum, int cols, float inv_cols) {
  const float mean = sum * inv_cols;
  return fmaf(fmaf(-mean, static_cast<float>(cols), sum), inv_cols, mean);
}

}  // namespace bertfast
