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

// The sum over kThreads threads, in each of them: lanes of one warp, or whole warps of a block, all
// of which call this together. `slots` then holds a float for each of the block's warps, which
// nobody else touches until the block's next barrier.
template<int kThreads, int kBlock = kThreads>
__device__ __forceinline__ float row_sum(float value, Shared<float> slots) {
  if constexpr (kThreads <= 32) {
    return lane_sum<kThreads>(value);
  } else {
    constexpr int kWarps = kThreads / 32;
    const int own = threadIdx.x / 32, first = kBlock == kThreads ? 0 : own / kWarps * kWarps;
    value = lane_sum<32>(value);
    if (threadIdx.x % 32 == 0) slots.store(own, value);
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += slots.load(first + warp);
    return total;
  }
}

}  // namespace bertfast
