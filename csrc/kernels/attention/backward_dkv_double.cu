// dk and dv by the kernel of backward_dkv.cu with 128 keys a block, 32 a warp: what a warp reads of
// queries and dout it multiplies twice, as in forward_double.cu. What is written has the same bits.
// For heads of up to 64, as there are no registers for wider ones. A lane has all keys that a
// call of dropout serves.
//
// Moves 4 + 2 * (tiles of 128) values an element of q, mostly from the second-level cache.
#include <algorithm>

#include "device/attention/dkv_double_tile.cuh"
#include "device/attention/dkv_tile.cuh"
#include "device/attention/launch.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

constexpr int kBefore = 31;
constexpr int kMostColumns = 64;

template<int kDim>
constexpr int kTileBytes = std::max(Dkv<kDim>::kTileBytes, DkvDouble<kDim>::kTileBytes);
template<int kDim>
constexpr int kBlocks = blocks_anywhere(kTileBytes<kDim> + ManyBits::kBeside, kDim == 32 ? 3 : 2);

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kDim>)
    attention_backward_dkv_double_kernel(AttentionBackward p) {
  if constexpr (kDoubleIsUsed) {
    await_earlier_kernels();
    const TilePlace at = find_double_tile(p.batch, 0, kBefore);
    if (at.tile == 2 * kTileRows) {
      dkv_double_tile<T, kDim, kDropout>(p, at);
      return;
    }
    for_each_turn([&](int alone) {
      return dkv_tile<T, kDim, kDropout, false, kDim == kRotatedColumns>(
          p, [&] { return find_double_tile(p.batch, alone, kBefore); });
    });
  }
}

// Of shared memory, for a block.
template<int kDim>
int bytes_of(const AttentionBatch& p) {
  return kTileBytes<kDim> + std::max(ManyBits::kBeside, attention_bytes(p));
}

}  // namespace

bool dkv_double_takes(const AttentionBackward& p, const Gpu& gpu) {
  const bool rotates = has_whole_heads(p.batch) && p.batch.head_dim == kRotatedColumns;
  return (p.batch.scores.half == 0 || rotates) && p.batch.head_dim <= kMostColumns &&
         double_tiles_fill(p.batch, gpu) &&
         2 * (bytes_of<kMostColumns>(p.batch) + 1024) <= gpu.shared_memory;
}

cudaError_t launch_dkv_double(const AttentionBackward& params, DType dtype, Stream stream) {
  AttentionBackward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = std::min(decltype(dim)::value, kMostColumns);  // no wider ones come
    const dim3 grid = attention_grid(p.batch, kBefore, 2 * kTileRows);
    const auto kernel = p.batch.seed ? attention_backward_dkv_double_kernel<T, kDim, true>
                                     : attention_backward_dkv_double_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes_of<kDim>(p.batch), stream, p);
  });
}

}  // namespace bertfast
