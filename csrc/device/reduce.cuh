// Sums over the threads that share a row.
#pragma once

#include "device/cuda.cuh"

namespace bertfast {

// The sum over each group of kThreads neighbouring lanes, in every lane. Butterfly: a fixed order.
template<int kThreads>
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over kThreads threads, in each of them: lanes of one warp, or the whole block. For a
// block `slots` holds kThreads / 32 floats that nobody else touches until the block's next barrier.
template<int kThreads>
__device__ __forceinline__ float row_sum(float value, Shared<float> slots) {
  if constexpr (kThreads <= 32) {
    return lane_sum<kThreads>(value);
  } else {
    constexpr int kWarps = kThreads / 32;
    value = lane_sum<32>(value);
    if (threadIdx.x % 32 == 0) slots.store(threadIdx.x / 32, value);
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += slots.load(warp);
    return total;
  }
}

}  // namespace bertfast
