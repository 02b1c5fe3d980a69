// Dropout of attention's scores.
#pragma once

#include "device/attention/place.cuh"
#include "device/philox.cuh"

namespace bertfast {

// Which scores dropout keeps. A Philox call serves two queries by four keys with stride 8; the
// layout is in bertfast/ops/dropout.py.
struct ScoreDropout {
  // The seed's halves and the number of the head among all; they wait there, as they are needed for
  // a moment only in each step.
  Shared<uint4> kept;
  unsigned site, least;  // least: the threshold in the upper half

  // Nobody may draw before a barrier.
  __device__ __forceinline__ ScoreDropout(const AttentionBatch& p, const TilePlace& at, bool drops,
                                          int tiles_end, int thread)
      : kept(shared_memory<uint4>(tiles_end + TilePlace::kDropout)),
        site(p.site),
        least(p.threshold << 16) {
    if (!drops || thread != 0) return;
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    kept.store(0, make_uint4(static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32),
                             at.batch * p.heads + at.head, 0));
  }

  // The call that serves a query, and a key.
  static __device__ __forceinline__ int query_call(int i) { return (i >> 4) << 3 | (i & 7); }
  static __device__ __forceinline__ int key_call(int j) { return (j >> 5) << 3 | (j & 7); }

  // Eight draws of 16 bits: queries 0, 8 of the call in words 0-1, 2-3; keys 0, 8, 16, 24 in the
  // two words' halves, low half first.
  // further: how many heads on from the tile's, as other sequences that share it are.
  __device__ __forceinline__ uint4 draw(int query_call, int key_call, int further = 0) const {
    const uint4 of_tile = kept.load(0);
    return philox(make_uint4(static_cast<unsigned>(key_call), static_cast<unsigned>(query_call),
                             of_tile.z + static_cast<unsigned>(further), site),
                  make_uint2(of_tile.x, of_tile.y));
  }

  // Compared unsplit: the upper half where it is, the lower one shifted there.
  __device__ __forceinline__ bool keeps_low(unsigned word) const { return word << 16 >= least; }
  __device__ __forceinline__ bool keeps_high(unsigned word) const { return word >= least; }

  // One score's, where the call's others are of no use.
  __device__ __forceinline__ bool keeps(int i, int j, int further) const {
    const uint4 words = draw(query_call(i), key_call(j), further);
    const unsigned first = j & 16 ? words.y : words.x, second = j & 16 ? words.w : words.z;
    const unsigned word = i & 8 ? second : first;
    return j & 8 ? keeps_high(word) : keeps_low(word);
  }
};

}  // namespace bertfast
