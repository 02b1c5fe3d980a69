// The softmax of rows whose scores come a block of keys at a time.
#pragma once

#include <cmath>

#include "device/math.cuh"

namespace bertfast {

// A thread's two rows of a warp's 16. With c = scale * log2 e, m is the largest c * score of a row
// so far, rounded, and l the thread's part of the sum of exp2(c s - m). The product is rounded
// before anything is subtracted from it: were it the exact one here and the rounded one there, as
// by a fused multiply-add, large scores would scale by the rounding error.
struct OnlineSoftmax {
  float m[2] = {-INFINITY, -INFINITY};
  float l[2] = {};
  float alpha[2];  // by which sums so far have to be scaled, after the last block
  bool grows;      // whether that isn't 1

  // Scores become exp2(c s - m).
  template<int kEights>
  __device__ __forceinline__ void next(float (&s)[kEights][4], float c) {
    grows = false;
    float used[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < kEights; ++n) {
        highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(m[r], __fmul_rn(highest, c));
      // A row that has seen no key yet is all -inf: any finite m serves it.
      used[r] = highest == -INFINITY ? 0.f : highest;
      alpha[r] = exp2_approx(m[r] - used[r]);
      grows |= highest != m[r];
      m[r] = highest;
      l[r] *= alpha[r];
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(fmaf(s[n][i], c, -used[i / 2]));
        l[i / 2] += s[n][i];
      }
    }
  }

  // Scales sums of earlier blocks. After a few blocks m hardly grows. All lanes call it.
  template<int kEights>
  __device__ __forceinline__ void scale(float (&sums)[kEights][4]) const {
    if (!__any_sync(0xffffffffu, grows)) return;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] *= alpha[i / 2];
    }
  }
};

}  // namespace bertfast
