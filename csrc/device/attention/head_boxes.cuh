// Heads as bulk copies find them: boxes of 64 positions of one head, in slabs of 64 columns, or of
// 32 where heads have no more.
//
// A slab lies in shared memory as rows of Tile<64> or Tile<32> do, and one slab behind the other.
// So heads of 96 take as much of it as those of 128. What is beyond a head's columns or a tensor's
// end is zeros; beyond a sequence's end there are others' rows.
//
// A tensor map has one stride for positions and one for heads, and none is left for sequences: a
// padded one begins a whole number of positions behind the one before.
#pragma once

#include <limits>

#include "device/attention/place.cuh"
#include "device/tile.cuh"
#include "device/tma.cuh"

namespace bertfast {

template<int kFirst, int kColumns>
struct Slab {
  using Rows = Tile<kColumns>;
  static constexpr int kColumn = kFirst;
  static constexpr int kByte = kTileRows * 2 * kFirst;  // from the first slab's
};

// Calls use(slab) with each slab of a head.
template<int kDim, int kFirst = 0, class Use>
__device__ __forceinline__ void for_each_slab(Use use) {
  if constexpr (kFirst < kDim) {
    constexpr int kColumns = kDim == 32 ? 32 : 64;
    use(Slab<kFirst, kColumns>());
    for_each_slab<kDim, kFirst + kColumns>(use);
  }
}

template<int kDim>
struct HeadBoxes {
  static constexpr int kColumns = kDim == 32 ? 32 : 64;  // of a slab
  static constexpr int kSlabBytes = kTileRows * 2 * kColumns;
  static constexpr int kBytes = (kDim + kColumns - 1) / kColumns * kSlabBytes;
  TensorMap map;
  int sequence;  // rows from one padded sequence to the next; 0 for packed ones

  // The row of a position in the map.
  __device__ __forceinline__ int row(const TilePlace& at, int position) const {
    return at.batch * sequence + at.start + position;
  }

  // Starts copying 64 rows of a head to byte `to`. Their kBytes arrive at barrier i.
  __device__ __forceinline__ void load(int to, int row, int head, Mbarriers barriers, int i) const {
    for_each_slab<kDim>([&](auto slab) {
      using S = decltype(slab);
      tma_load(shared_memory<uint4>(to + S::kByte), map, S::kColumn, row, head, barriers, i);
    });
  }
};

// The boxes of a tensor, with slabs of 64 columns; false if no tensor map can describe them.
template<class Void>
bool describe_heads(Boxes* boxes, int* sequence, const HeadRows<Void>& x, const AttentionBatch& p) {
  int64_t between = 0;
  int64_t rows = p.lse_head;  // of a sequence, or of all packed ones
  if (!p.cu_seqlens && p.batch > 1) {
    if (x.token < 1 || x.batch < 0 || x.batch % x.token != 0) return false;
    between = x.batch / x.token;
    rows += between * (p.batch - 1);
  }
  // The first row of a box must be an int, beyond the end as well.
  if (rows > std::numeric_limits<int>::max() - 4 * kTileRows) return false;
  *sequence = int(between);
  *boxes = {x.data,
            {p.head_dim, int(rows), p.heads},
            {x.token, p.heads > 1 ? x.head : 8},  // nobody uses the stride of a single head
            {64, kTileRows, 1}};
  return describes_boxes(*boxes);
}

template<int kDim, class Void>
cudaError_t make_head_boxes(HeadBoxes<kDim>* made, const HeadRows<Void>& x,
                            const AttentionBatch& p) {
  Boxes boxes;
  if (!describe_heads(&boxes, &made->sequence, x, p)) return cudaErrorInvalidValue;
  boxes.box[0] = HeadBoxes<kDim>::kColumns;
  return make_tensor_map(&made->map, boxes);
}

}  // namespace bertfast
