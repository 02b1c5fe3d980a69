// Scores with queries as rows: masked and dropped where they are; sums as an operand.
#pragma once

#include "device/attention/many.cuh"

namespace bertfast {

// What both kernels with queries as rows do to 32 scores of a row, s[n][i] for n in 0-3: of the
// keys that don't count they become `masked`.
__device__ __forceinline__ void mask_keys(float (*s)[4], float masked, unsigned on,
                                          const TilePlace& at, int many_bits, int group,
                                          int thread) {
  if (on == 0xffffffffu && at.many == 1) return;
  const int t = thread % 4;
  unsigned row_on[2] = {on >> (2 * t), on >> (2 * t)};
  if (at.many > 1) {
    const unsigned same = ManyBits::get(many_bits, thread).same;
    row_on[0] = ManyBits::of_row(same, 0, group);
    row_on[1] = ManyBits::of_row(same, 1, group);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = row_on[i / 2] >> (8 * n + i % 2) & 1 ? s[n][i] : masked;
    }
  }
}

// And dropout makes zeros of some. group: how many 32 keys come before.
__device__ __forceinline__ void drop_keys(float (*s)[4], const ScoreDropout& dropout,
                                          int query_call, const TilePlace& at, int many_bits,
                                          int group, int thread) {
  if (at.many > 1) {
    const unsigned keep = ManyBits::get(many_bits, thread).keep;
    const unsigned row_keep[2] = {ManyBits::of_row(keep, 0, group),
                                  ManyBits::of_row(keep, 1, group)};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = row_keep[i / 2] >> (8 * n + i % 2) & 1 ? s[n][i] : 0.f;
      }
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int key_call = 8 * group + thread % 4 * 2 + e;
    const uint4 words = dropout.draw(query_call, key_call);
    const unsigned of_row[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const unsigned word = of_row[r][n / 2];
        const bool kept = n % 2 ? dropout.keeps_high(word) : dropout.keeps_low(word);
        s[n][2 * r + e] = kept ? s[n][2 * r + e] : 0.f;
      }
    }
  }
}

// Two fragments of sums, side by side, as an A operand.
template<class T>
__device__ __forceinline__ void as_operand(unsigned (&a)[4], const float (&left)[4],
                                           const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

}  // namespace bertfast
