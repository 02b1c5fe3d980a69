// The turns of a tile: all its sequences at once and, if need be, each of them alone.
//
// Masking isn't enough where one of several sequences has a NaN or an infinity: its products with
// the others' zeros are NaN. So a shared tile that ends with a sum that isn't finite is done again,
// sequence by sequence: each where it lies in the tile, with zeros in all other rows, and nothing
// but its own rows is written. So the others get the very bits that they would have without it. It
// costs the tiles that don't need it a test at their end.
#pragma once

#include "device/attention/place.cuh"

namespace bertfast {

// Calls turn(alone), which returns the next one's: once with 0 and, if need be, with each sequence.
template<class Turn>
__device__ __forceinline__ void for_each_turn(Turn turn) {
  int alone = 0;
  do {
    alone = turn(alone);
  } while (alone > 0);
}

// Whether no sum is NaN or infinite: 0 times those is NaN.
template<int kCount>
__device__ __forceinline__ bool all_finite(const float (&sums)[kCount][4]) {
  float zero = 0.f;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) zero = fmaf(sums[n][i], 0.f, zero);
  }
  return zero == 0.f;
}

// Whether this was a tile of many, done at once, in which a thread's sums aren't finite: then each
// sequence has to be done alone. All threads ask.
__device__ __forceinline__ bool spoilt(const TilePlace& at, bool finite) {
  return at.many > 1 && at.alone == 0 && __syncthreads_or(!finite);
}

// The sequence to do alone after this one; 0: none is left.
__device__ __forceinline__ int next_alone(const AttentionBatch& p, const TilePlace& at) {
  for (int n = at.alone; n < at.many; ++n) {
    if (p.cu_seqlens[at.batch + n] < p.cu_seqlens[at.batch + n + 1]) return n + 1;
  }
  return 0;
}

// The same at a turn's end; 0 after a turn of all at once.
__device__ __forceinline__ int turn_after(const AttentionBatch& p, const TilePlace& at) {
  if (at.alone == 0) return 0;
  __syncthreads();  // the next one overwrites what others may still read
  return next_alone(p, at);
}

}  // namespace bertfast
