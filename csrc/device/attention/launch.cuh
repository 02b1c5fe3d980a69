// What the launches of attention's kernels share: variant, grid and shared memory.
#pragma once

#include <type_traits>
#include "device/attention/many.cuh"

namespace bertfast {

// Calls use(T(), kDim) with the element type and the least head dimension that has a kernel.
template<class Use>
auto with_head_dim(DType dtype, int head_dim, Use use) {
  const auto with_dim = [&](auto t) {
    if (head_dim <= 32) return use(t, std::integral_constant<int, 32>());
    if (head_dim <= 64) return use(t, std::integral_constant<int, 64>());
    if (head_dim <= 96) return use(t, std::integral_constant<int, 96>());
    return use(t, std::integral_constant<int, 128>());
  };
  return dtype == DType::kFloat16 ? with_dim(__half()) : with_dim(__nv_bfloat16());
}

// The grid, which it also enters into p. Where dropout's coordinates don't start at a sequence's
// first position, up to `before` positions before it belong to the first tile.
inline dim3 attention_grid(AttentionBatch& p, int before, int rows = kTileRows) {
  if (p.tiles) {
    p.n_tiles = p.plan_size;
    return dim3(p.n_tiles * p.heads);
  }
  const int extra = p.key_mask && p.seed ? before : 0;
  p.n_tiles = (p.length + extra + rows - 1) / rows;
  return dim3(p.n_tiles * p.heads * p.batch);
}

// Of shared memory, beside the tiles: the place, and the mask or what is known of shared tiles.
inline int attention_bytes(const AttentionBatch& p) {
  if (p.tiles) return ManyBits::kBeside;
  return TilePlace::kSharedBytes + (p.key_mask ? Keys::shared_bytes(p.length) : 0);
}

}  // namespace bertfast
