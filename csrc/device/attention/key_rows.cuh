// Where a tile's rows are keys, as in attention's kernel for dk and dv: which key a row is, so that
// lanes can share the calls of dropout.
#pragma once

#include "device/attention/dropout.cuh"

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

}  // namespace bertfast
