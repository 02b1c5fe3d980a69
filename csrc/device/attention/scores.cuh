// Scores with queries as rows: masked and dropped where they are; sums as an operand.
#pragma once

#include "device/attention/many.cuh"

namespace bertfast {

// Of a row's scores those whose bit 8 n + e isn't set become `masked`.
__device__ __forceinline__ void select_keys(float (*s)[4], float masked,
                                            const unsigned (&row_on)[2]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = row_on[i / 2] >> (8 * n + i % 2) & 1 ? s[n][i] : masked;
    }
  }
}

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
  select_keys(s, masked, row_on);
}

// The same scores, of a warp's 16 queries and 32 keys, in a call with a window or a bias.
struct KeysByPosition {
  const AttentionBatch& p;
  int query, key;  // the first of both
  int head, many, thread, tiles_end;

  // at: the tile, whose kernel's tiles end at tiles_end.
  __device__ __forceinline__ KeysByPosition(const AttentionBatch& p, const TilePlace& at,
                                            int tiles_end, int query, int key, int thread)
      : p(p),
        query(query),
        key(key),
        head(at.head),
        many(at.many),
        thread(thread),
        tiles_end(tiles_end) {}

  // Products become scores, in units of log2 e, if there is a bias. c: scale * log2 e.
  __device__ __forceinline__ void add_bias(float (*s)[4], float c) const {
    if (!p.scores.bias) return;
    const BiasLine line(p.scores, head, key - query - 15, tiles_end + bytes_beside(p), thread);
    const int first = 15 + thread % 4 * 2 - thread % 32 / 4;  // of keys 0 and 1, and row g
    float lower[2] = {line[first - 8], line[first - 7]};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float upper = line[first + 8 * n + e];
        s[n][e] = fmaf(s[n][e], c, upper);
        s[n][2 + e] = fmaf(s[n][2 + e], c, lower[e]);
        lower[e] = upper;
      }
    }
  }

  // mask_keys, with the window, where it has something to do. on: keys that count.
  __device__ __forceinline__ void mask(float (*s)[4], float masked, unsigned on, int many_bits,
                                       int group) const {
    const int g = thread % 32 / 4, t = thread % 4;
    unsigned row_on[2];
    if (many > 1) {
      const unsigned same = ManyBits::get(many_bits, thread).same;
      row_on[0] = ManyBits::of_row(same, 0, group);
      row_on[1] = ManyBits::of_row(same, 1, group);
    } else {
      // A block that all of the warp's queries see whole.
      const bool all = key >= query + 15 - p.scores.left && key + 31 <= query + p.scores.right;
      if (on == 0xffffffffu && all) return;
      row_on[0] = on & keys_of_query(p.scores, query + g, key);
      row_on[1] = on & keys_of_query(p.scores, query + g + 8, key);
      row_on[0] >>= 2 * t;
      row_on[1] >>= 2 * t;
    }
    select_keys(s, masked, row_on);
  }
};

// And dropout makes zeros of some. group: how many 32 keys come before; calls_before: dropout's of
// keys before all of those.
__device__ __forceinline__ void drop_keys(float (*s)[4], const ScoreDropout& dropout,
                                          int query_call, const TilePlace& at, int many_bits,
                                          int group, int thread, int calls_before = 0) {
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
    const int key_call = calls_before + 8 * group + thread % 4 * 2 + e;
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
