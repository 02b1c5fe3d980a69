// The left side of attention's products: the rows that a warp keeps while the other side's stream.
#pragma once

#include "device/tile.cuh"

namespace bertfast {

// A warp's rows as operands, kParts times 16 of them from 16 * kParts * warp of the tile on: held
// in registers, or read again each time.
template<int kDim, int kParts, bool kHeld>
struct OwnRows {
  using Rows = Tile<kDim>;
  static constexpr unsigned kSigns = 0x80008000u;  // of two values
  unsigned held[kHeld ? kParts : 1][kHeld ? kDim / 16 : 1][4];
  Shared<uint4> tile;

  static __device__ __forceinline__ int row(int part, int thread) {
    return 16 * (kParts * (thread / 32) + part);
  }

  // negative: with the other sign. Those that aren't held get it where they lie, by their warp.
  __device__ __forceinline__ OwnRows(Shared<uint4> tile, bool negative, int thread) : tile(tile) {
    if constexpr (kHeld) {
      const unsigned signs = negative ? kSigns : 0u;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          Rows::load_a(held[part][k], tile, row(part, thread), k, thread);
#pragma unroll
          for (int i = 0; i < 4; ++i) held[part][k][i] ^= signs;
        }
      }
    } else if (negative) {
      constexpr int kChunks = 16 * kParts * Rows::kChunks;  // of the warp's rows
      for (int i = thread % 32; i < kChunks; i += 32) {
        const int at = thread / 32 * kChunks + i;
        const uint4 x = tile.load(at);
        tile.store(at, make_uint4(x.x ^ kSigns, x.y ^ kSigns, x.z ^ kSigns, x.w ^ kSigns));
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void load(unsigned (&a)[4], int part, int k, int thread) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[part][k][i];
    } else {
      Rows::load_a(a, tile, row(part, thread), k, thread);
    }
  }
};

}  // namespace bertfast
