// Which keys of a sequence count, and the copies of those into shared memory.
#pragma once

#include "device/attention/place.cuh"

namespace bertfast {

// Which keys count: those from low to high, less what the mask's bits leave out. Of a sequence that
// is done alone its own: the bits leave out those before it.
struct Keys {
  int low, high;
  bool masked;
  Shared<unsigned> words;  // bit b of word w: key 32 w + b counts

  // Bytes of shared memory beside the tiles: two ends for each warp, then the words, which reach
  // two tiles beyond the length.
  static __host__ __device__ constexpr int word_count(int length) {
    return (length + 31) / 32 + 2 * kTileRows / 32;
  }
  static __host__ __device__ constexpr int shared_bytes(int length, int warps = kAttentionWarps) {
    return 4 * (2 * warps + word_count(length));
  }

  // The block's warps read the mask, once, if there is one; the bytes begin at `shared`.
  __device__ __forceinline__ Keys(const AttentionBatch& p, const TilePlace& at, int shared,
                                  int thread, int warps = kAttentionWarps)
      : low(0),
        high(at.length),
        masked(p.key_mask || at.alone),
        words(shared_memory<unsigned>(shared)) {
    if (!masked) return;
    const Shared<int> ends = shared_memory<int>(shared);
    words = shared_memory<unsigned>(shared + 8 * warps);
    const uint8_t* mask = p.key_mask + at.batch * p.mask_batch;
    const int warp = thread / 32, lane = thread % 32;
    low = at.length;
    high = 0;
#pragma unroll 1
    for (int word = warp; word < word_count(at.length); word += warps) {
      const int key = 32 * word + lane;
      const bool on = key < at.length && (p.key_mask ? mask[key] != 0 : key >= at.from);
      const unsigned bits = __ballot_sync(0xffffffffu, on);
      if (lane == 0) words.store(word, bits);
      if (bits) {
        low = min(low, 32 * word + __ffs(bits) - 1);
        high = 32 * word + 32 - __clz(bits);
      }
    }
    if (lane == 0) {
      ends.store(2 * warp, low);
      ends.store(2 * warp + 1, high);
    }
    __syncthreads();
#pragma unroll
    for (int other = 0; other < warps; ++other) {
      low = min(low, ends.load(2 * other));
      high = max(high, ends.load(2 * other + 1));
    }
    low = at.alone ? 0 : min(low, high);
  }

  // Leaves out keys that no query of those from `first` to `last` sees, at the beginning in whole
  // 32, as dropout's calls have them. Returns how many at the beginning.
  __device__ __forceinline__ int keep_seen(const AttentionScores& scores, int first, int last) {
    const int before = max(first - scores.left - low, 0) & ~31;
    low += before;
    high = max(min(high, last + scores.right), low);
    return before;
  }

  // Bit b: key position + b counts.
  __device__ __forceinline__ unsigned bits(int position) const {
    if (!masked) {
      const int left = high - position;
      return left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
    }
    const int word = position >> 5;
    return __funnelshift_r(words.load(word), words.load(word + 1), position & 31);
  }

  // Whether the key at a position of the sequence counts, of a sequence that isn't done alone, as
  // the words at `shared` say.
  static __device__ __forceinline__ bool counts(const AttentionBatch& p, int shared, int position) {
    if (!p.key_mask) return true;
    const Shared<unsigned> words = shared_memory<unsigned>(shared + 8 * kAttentionWarps);
    const int key = max(position, 0);  // the first one may be before the sequence
    return (words.load(key >> 5) >> (key & 31) & 1) != 0;
  }
};

// Rows of a head as copies read them, from `position` on.
template<class Rows, int kRows, class T>
__device__ __forceinline__ auto copies_of(const HeadRows<const void>& x, const AttentionBatch& p,
                                          const TilePlace& at, int position, int thread) {
  using Copies = typename Rows::template Copies<kRows, kAttentionThreads, T>;
  return Copies(row_of<const T>(x, at, position), x.token, p.head_dim, thread);
}

// The keys of a block that count, 32 in a word.
template<int kKeys>
struct KeyBits {
  unsigned words[kKeys / 32];

  __device__ __forceinline__ KeyBits(const Keys& keys, int block) {
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) words[i] = keys.bits(keys.low + block * kKeys + 32 * i);
  }

  // Copies a block of keys or values. What doesn't count is zero, so nothing that lies there gets
  // into a product.
  template<class Copies>
  __device__ __forceinline__ void start(const Copies& copies, Shared<uint4> tile, int block) const {
    copies.start(tile, block, [&](int i, int) {
      return (words[i / 32] >> copies.first() >> (i % 32) & 1) != 0;
    });
  }
};

}  // namespace bertfast
