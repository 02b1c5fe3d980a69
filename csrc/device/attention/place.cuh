// Where a tile of attention lies.
//
// Positions count from a sequence's first token, so a padded and a packed batch differ only in
// where that token is. A tile is 64 positions of one sequence and head, or, of a plan, 32 or 64,
// which several short sequences may share, whole, one after the other ("many"): they are then one
// sequence whose scores between different ones are masked. Of a tile of 32 half the warps only help
// to copy.
#pragma once

#include "device/attention/block.cuh"
#include "device/math.cuh"
#include "params.h"

namespace bertfast {

struct TilePlace {
  int batch, head;
  int first;                             // position of the tile's first row
  int start;                             // the sequence's first token
  int length;                            // of the sequence
  int many;                              // how many sequences share the tile
  int tile;                              // its size
  int alone = 0;                         // which of them is done alone, from 1 on; 0: all at once
  int from = 0;                          // the first position to do; `length` is their end
  unsigned low_keys = 0, high_keys = 0;  // which of the rows, if they are keys, count

  // Between a kernel's beginning and its end this waits in shared memory, as the registers are
  // needed. Others see it after a barrier.
  static constexpr int kSharedBytes = 64;
  static constexpr int kDropout = 48;  // where what dropout needs waits too
  __device__ __forceinline__ void put(int shared, int thread) const {
    if (thread != 0) return;
    const Shared<int4> slots = shared_memory<int4>(shared);
    slots.store(0, make_int4(batch, head, first, start));
    slots.store(1, make_int4(length, many, low_keys, high_keys));
    shared_memory<int2>(shared + 32).store(0, make_int2(alone, from));
  }
  static __device__ __forceinline__ TilePlace get(const AttentionBatch& p, int shared) {
    const Shared<int4> slots = shared_memory<int4>(shared);
    const int4 a = slots.load(0), b = slots.load(1);
    const int2 c = shared_memory<int2>(shared + 32).load(0);
    return {a.x, a.y, a.z, a.w, b.x, b.y, p.tile, c.x, c.y, unsigned(b.z), unsigned(b.w)};
  }

  __device__ __forceinline__ bool counts(int key) const {
    return ((key < 32 ? low_keys : high_keys) >> (key & 31) & 1) != 0;
  }
  __device__ __forceinline__ bool inside(int row) const {
    return row < tile && first + row >= from && first + row < length;
  }
};

// Tiles of one head of a sequence are neighbours, as they read the same keys. The grid has room for
// the longest sequence, or for the longest plan; a block without a tile leaves at once, which costs
// less than what a persistent grid would hold back in registers and in balance.
//
// kRows: positions of a tile, where no plan says it.
template<int kRows = kTileRows>
__device__ __forceinline__ TilePlace find_tile(const AttentionBatch& p, int alone) {
  const int block = anew(int(blockIdx.x)), tiles = p.n_tiles;
  TilePlace at;
  at.tile = p.tile;
  if (p.tiles) {
    at.head = block / tiles;
    const int32_t* entry = p.tiles + 3 * (block % tiles);
    at.batch = entry[0];
    at.first = entry[1];
    at.many = entry[2];  // 0 beyond the list's end, and so is the length
    at.start = p.cu_seqlens[at.batch];
    at.length = p.cu_seqlens[at.batch + (alone ? alone : at.many)] - at.start;
    if (alone) at.from = p.cu_seqlens[at.batch + alone - 1] - at.start;
    at.alone = alone;
    return at;
  }
  at.first = block % tiles * kRows;
  at.head = block / tiles % p.heads;
  at.batch = block / tiles / p.heads;
  at.many = 1;
  at.start = 0;
  at.length = p.length;
  if (p.cu_seqlens) {
    at.start = p.cu_seqlens[at.batch];
    at.length = p.cu_seqlens[at.batch + 1] - at.start;
  }
  return at;
}

// The same where a block may have two tiles of one sequence: `tile` is 2 * kTileRows then. It has
// one where no more is left of the sequence, or where several share it. In a plan's list, which is
// in tiles of kTileRows, a sequence's first of two has both, and the second one's block has
// nothing.
__device__ __forceinline__ TilePlace find_double_tile(const AttentionBatch& p, int alone,
                                                      int before) {
  TilePlace at = find_tile<2 * kTileRows>(p, alone);
  if (p.tiles && at.first / kTileRows % 2 != 0) at.length = 0;
  const int extra = p.key_mask && p.seed ? before : 0;
  if (at.many == 1 && at.length - at.first + extra > kTileRows) at.tile = 2 * kTileRows;
  return at;
}

// Element 0 of the row at `position`.
template<class T, class Void>
__device__ __forceinline__ T* row_of(const HeadRows<Void>& x, const TilePlace& at, int position) {
  return static_cast<T*>(x.data) + at.batch * x.batch + at.head * x.head +
         int64_t(at.start + position) * x.token;
}

// Where the statistics of the row at `position` are.
__device__ __forceinline__ int64_t statistics_of(const AttentionBatch& p, const TilePlace& at,
                                                 int position) {
  return at.batch * p.lse_batch + at.head * p.lse_head + at.start + position;
}

}  // namespace bertfast
