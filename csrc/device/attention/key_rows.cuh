// Where a tile's rows are keys, as in attention's kernel for dk and dv: which key a row is, so that
// lanes can share the calls of dropout.
#pragma once

#include "device/attention/many.cuh"

namespace bertfast {

// The key of a row of the second kernel's tile. A Philox call serves keys 0, 8, 16, 24 of 32, and a
// lane's fragments hold only two rows: so that lanes l and l ^ 16 can share their calls, a warp
// takes the keys of 32 whose numbers mod 8 are below 4, or from 4 on.
__device__ __forceinline__ int key_of_row(int row) {
  const int in_warp = row & 15, warp = row >> 4;
  return (warp & 2) << 4 | (in_warp & 12) << 1 | (warp & 1) << 2 | (in_warp & 3);
}

// Each lane's draws of its two keys (rows g, g + 8) and the queries 2 t, 2 t + 1 (e) and those 8
// further on (b): keys in the halves of word [e][b]. Lanes with g < 4 draw for e = 0 and the others
// for e = 1, and they exchange the halves that belong to the other's keys.
__device__ __forceinline__ void share_draws(unsigned (&words)[2][2], const ScoreDropout& dropout,
                                            int first_query, int key_call, int thread) {
  const int lane = thread % 32, e = lane / 16;
  const int query = first_query + lane % 4 * 2 + e;
  const uint4 drawn = dropout.draw(ScoreDropout::query_call(query), key_call);
  const unsigned of_query[2][2] = {{drawn.x, drawn.y}, {drawn.z, drawn.w}};
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    // A lane's keys are 0 and 16 of 32, or 8 and 24: the low halves, or the high ones.
    const unsigned low = __byte_perm(of_query[b][0], of_query[b][1], 0x5410);
    const unsigned high = __byte_perm(of_query[b][0], of_query[b][1], 0x7632);
    const unsigned other = __shfl_xor_sync(0xffffffffu, e ? low : high, 16);
    const unsigned mine = e ? high : low;
    words[0][b] = e ? other : mine;
    words[1][b] = e ? mine : other;
  }
}

// Scores of a warp's 16 keys and 16 queries, s[n][i] for n in 0 and 1, in a call with a window or a
// bias.
struct QueriesByPosition {
  const AttentionBatch& p;
  const TilePlace& at;
  int query, key;   // the first query, and the thread's first key; the other one is 16 further on
  int key_of_warp;  // the first one's, of keys that reach over 28 positions
  int thread, tiles_end;

  // at: the tile, whose kernel's tiles end at tiles_end.
  __device__ __forceinline__ QueriesByPosition(const AttentionBatch& p, const TilePlace& at,
                                               int tiles_end, int query, int thread)
      : p(p),
        at(at),
        query(query),
        key(at.first + key_of_row(16 * (thread / 32) + thread % 32 / 4)),
        key_of_warp(at.first + key_of_row(16 * (thread / 32))),
        thread(thread),
        tiles_end(tiles_end) {}

  // Products become scores, in units of log2 e, if there is a bias. c: scale * log2 e.
  __device__ __forceinline__ void add_bias(float (&s)[2][4], float c) const {
    if (!p.scores.bias) return;
    const int least = key_of_warp - query - 15;
    const BiasLine line(p.scores, at.head, least, tiles_end + bytes_beside(p), thread);
    const int first = key - query - thread % 4 * 2 - least;  // of the thread's first key and query
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = fmaf(s[n][i], c, line[first + i / 2 * 16 - 8 * n - i % 2]);
      }
    }
  }

  // Probabilities of what isn't seen become zero, and those of rows behind the sequence, where a
  // bias may have made them infinite. columns: how many eights of queries come before.
  __device__ __forceinline__ void mask(float (&s)[2][4], int many_bits, int columns) const {
    unsigned seen;  // bit 16 r + 8 n + e
    if (at.many > 1) {
      const unsigned same = ManyBits::get(many_bits, thread).same >> (2 * columns);
      seen = (same & 0x00030003u) | (same & 0x000c000cu) << 6;
    } else {
      const int t = thread % 4;
      // What all of the warp's keys are seen by.
      const bool all = query >= max(key_of_warp + 27 - p.scores.right, 0) &&
                       query + 15 <= min(key_of_warp + p.scores.left, at.length - 1);
      if (all) return;
      const unsigned first = queries_of_key(p.scores, key, query, at.length) >> (2 * t);
      const unsigned other = queries_of_key(p.scores, key + 16, query, at.length) >> (2 * t);
      seen = (first & 0xffffu) | other << 16;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = seen >> (16 * (i / 2) + 8 * n + i % 2) & 1 ? s[n][i] : 0.f;
      }
    }
  }
};

// The same of a warp that has all keys of 32, two parts of 16 in their order: each lane's draws of
// its four keys (rows g, g + 8 of each part) are those of its own calls.
__device__ __forceinline__ void draw_of_own(unsigned (&words)[2][2][2], const ScoreDropout& dropout,
                                            int first_query, int key_call, int thread) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int query = first_query + thread % 4 * 2 + e;
    const uint4 drawn = dropout.draw(ScoreDropout::query_call(query), key_call);
    words[0][e][0] = drawn.x;
    words[1][e][0] = drawn.y;
    words[0][e][1] = drawn.z;
    words[1][e][1] = drawn.w;
  }
}

}  // namespace bertfast
