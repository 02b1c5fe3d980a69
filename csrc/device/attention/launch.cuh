// What the launches of attention's kernels share: variant, grid and shared memory.
#pragma once

#include <type_traits>
#include "device/attention/many.cuh"
#include "device/gpu.cuh"

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

// The same with 64 or 128 columns, for kernels of rarer calls: narrower heads have zeros beside
// them, and the module fewer kernels.
template<class Use>
auto with_wide_dim(DType dtype, int head_dim, Use use) {
  const auto with_dim = [&](auto t) {
    if (head_dim <= 64) return use(t, std::integral_constant<int, 64>());
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

// Whether a call's sequences are long, and enough to fill a GPU whose blocks have tiles of 128.
inline bool double_tiles_fill(const AttentionBatch& p, const Gpu& gpu) {
  // On average, as of a packed batch some may be short.
  const int64_t tokens = p.cu_seqlens ? p.lse_head : int64_t(p.batch) * p.length;
  const bool are_long = p.tile == kTileRows && tokens > int64_t(p.batch) * kTileRows;
  if (gpu.capability == 90 || !are_long) return false;
  const int tiles = p.tiles ? p.plan_size : (p.length - 1) / kTileRows + 1;
  const int64_t of_head = int64_t(tiles + 1) / 2 * (p.tiles ? 1 : p.batch);
  return of_head * p.heads >= gpu.multiprocessors;
}

// Machine code for sm_90a runs on compute capability 9.0 alone, where other kernels are taken.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kDoubleIsUsed = false;
#else
constexpr bool kDoubleIsUsed = true;
#endif

// Of shared memory, all that a call has beside the tiles.
inline int attention_bytes(const AttentionBatch& p) {
  return bytes_beside(p) + (p.scores.bias ? BiasLine::kSharedBytes : 0);
}

}  // namespace bertfast
