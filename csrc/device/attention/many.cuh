// What is known of the scores of a tile that several sequences share.
#pragma once

#include "device/attention/by_position.cuh"
#include "device/attention/dropout.cuh"
#include "device/attention/keys.cuh"

namespace bertfast {

// The sequence of a row in a tile of many.
struct Segment {
  int origin, end, which;

  __device__ __forceinline__ Segment(const AttentionBatch& p, const TilePlace& at, int row)
      : origin(0), end(at.length), which(0) {
    for (int n = 1; n < at.many; ++n) {
      const int bound = p.cu_seqlens[at.batch + n] - at.start;
      if (bound <= row) {
        origin = bound;
        which = n;
      } else {
        end = min(end, bound);
      }
    }
  }
};

// What a thread knows of its 2 x 16 scores in a tile of many, whose sequences begin anywhere: bit
// 16 r + 2 n + e is row r, column 8 n + 2 t + e, for t = lane % 4. It waits in shared memory, as
// tiles of one sequence have no use for it and need the registers.
struct ManyBits {
  unsigned same = 0;  // of one sequence, and in the window
  unsigned keep = 0;  // by dropout

  static constexpr int kSharedBytes = kAttentionThreads * int(sizeof(uint2));
  // Where, from the tiles' end on: beyond the place, and the keys of a sequence done alone.
  static constexpr int kPlace = TilePlace::kSharedBytes + Keys::shared_bytes(kTileRows);
  // All that a plan's tile has beside its tiles of keys and queries.
  static constexpr int kBeside = kPlace + kSharedBytes;
  __device__ __forceinline__ void put(int shared, int thread) const {
    shared_memory<uint2>(shared).store(thread, make_uint2(same, keep));
  }
  static __device__ __forceinline__ ManyBits get(int shared, int thread) {
    const uint2 bits = shared_memory<uint2>(shared).load(thread);
    return {bits.x, bits.y};
  }

  // rows: the positions of the thread's two rows. kKeyRows: rows are keys and columns queries.
  // kWindow: there may be one.
  template<bool kDropout, bool kKeyRows, bool kWindow = false>
  static __device__ __forceinline__ ManyBits find(const AttentionBatch& p, const TilePlace& at,
                                                  const ScoreDropout& dropout, int row0, int row1,
                                                  int thread) {
    ManyBits found;
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const int row = r ? row1 : row0;
      const Segment segment(p, at, row);
      const int further = segment.which * p.heads;
#pragma unroll 1
      for (int c = 0; c < 16; ++c) {
        const int column = c / 2 * 8 + thread % 4 * 2 + c % 2;
        const unsigned bit = 1u << (16 * r + c);
        bool seen = column >= segment.origin && column < segment.end;
        if constexpr (kWindow) {
          seen &= kKeyRows ? in_window(p.scores, column, row) : in_window(p.scores, row, column);
        }
        if (seen) found.same |= bit;
        if constexpr (kDropout) {
          const int mine = row - segment.origin, other = column - segment.origin;
          const bool kept =
              kKeyRows ? dropout.keeps(other, mine, further) : dropout.keeps(mine, other, further);
          if (kept) found.keep |= bit;
        }
      }
    }
    return found;
  }

  // The bits of one row and of the columns from 32 * half, bit 8 n + e, as the words of KeyBits
  // shifted by 2 t have them.
  static __device__ __forceinline__ unsigned of_row(unsigned bits, int r, int half) {
    bits = bits >> (16 * r) >> (8 * half) & 0xffu;
    bits = (bits | bits << 12) & 0x000f000fu;
    return (bits | bits << 6) & 0x03030303u;
  }
};

// Of shared memory, beside the tiles: the place, and the mask or what is known of shared tiles.
__host__ __device__ inline int bytes_beside(const AttentionBatch& p) {
  if (p.tiles) return ManyBits::kBeside;
  return TilePlace::kSharedBytes + (p.key_mask ? Keys::shared_bytes(p.length) : 0);
}

}  // namespace bertfast
