// Dropout's random draws: Philox4x32 and the layout of its draws over a row.
//
// The layout is the same in every backend; bertfast/ops/dropout.py describes it.
#pragma once

#include "device/cuda.cuh"

namespace bertfast {

inline constexpr int kPhiloxRounds = 7;

template<int kRounds = kPhiloxRounds>
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const unsigned high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const unsigned high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// Which values of a row are kept. One call to keep() serves kCount neighbouring columns, the first
// of them a multiple of kCount; eight columns share a Philox call.
struct RowDropout {
  uint2 key;
  unsigned site, threshold;

  __device__ __forceinline__ RowDropout(int64_t seed, unsigned site, unsigned threshold)
      : site(site), threshold(threshold) {
    const uint64_t value = static_cast<uint64_t>(seed);
    key = make_uint2(static_cast<unsigned>(value), static_cast<unsigned>(value >> 32));
  }

  // kept[i]: column `col + i` is kept. Booleans become predicates; packed bits would be unpacked.
  template<int kCount>
  __device__ __forceinline__ void keep(int64_t row, int col, bool (&kept)[kCount]) const {
#ifndef BERTFAST_HOST
    // The first round's products depend on the column alone. Moved out of a loop over rows they
    // would hold registers for each column, more than a thread of single columns has.
    if constexpr (kCount == 1) asm volatile("" : "+r"(col));
#endif
    const uint64_t r = static_cast<uint64_t>(row);
    const uint4 words = philox(make_uint4(static_cast<unsigned>(col) >> 3, static_cast<unsigned>(r),
                                          static_cast<unsigned>(r >> 32), site),
                               key);
    if constexpr (kCount == 8) {
      pair(words.x, kept);
      pair(words.y, kept + 2);
      pair(words.z, kept + 4);
      pair(words.w, kept + 6);
    } else if constexpr (kCount == 4) {
      const bool upper = col & 4;
      pair(upper ? words.z : words.x, kept);
      pair(upper ? words.w : words.y, kept + 2);
    } else {
      static_assert(kCount == 1, "a row is dropped in vectors of 1, 4 or 8");
      const int word = col >> 1 & 3;
      const unsigned low = word & 1 ? words.y : words.x, high = word & 1 ? words.w : words.z;
      const unsigned pair = word & 2 ? high : low;
      kept[0] = (col & 1 ? pair >> 16 : pair & 0xffffu) >= threshold;
    }
  }

 private:
  __device__ __forceinline__ void pair(unsigned word, bool* kept) const {
    kept[0] = (word & 0xffffu) >= threshold;
    kept[1] = (word >> 16) >= threshold;
  }
};

}  // namespace bertfast
