// dq by the kernel of backward_dq.cu with 128 queries a block, 32 a warp: what a warp reads of keys
// and values it multiplies twice, as in forward_double.cu. What is written has the same bits. For
// heads of up to 64, as there are no registers for wider ones.
//
// Moves 4 + 2 * (tiles of 128) values an element of q, mostly from the second-level cache.
#include <algorithm>

#include "device/attention/dq_tile.cuh"
#include "device/attention/launch.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

constexpr int kBefore = 15;
constexpr int kMostColumns = 64;

template<int kDim>
constexpr int kTileBytes = std::max(Dq<kDim, 1>::kTileBytes, Dq<kDim, 2>::kTileBytes);
template<int kDim>
constexpr int kBlocks = blocks_anywhere(kTileBytes<kDim> + ManyBits::kBeside, 2);

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kDim>)
    attention_backward_dq_double_kernel(AttentionBackward p) {
  if constexpr (kDoubleIsUsed) {
    await_earlier_kernels();
    const TilePlace at = find_double_tile(p.batch, 0, kBefore);
    if (at.tile == 2 * kTileRows) {
      dq_tile<T, kDim, kDropout, 2, false, true>(p, at);
      return;
    }
    for_each_turn([&](int alone) {
      const TilePlace next = find_double_tile(p.batch, alone, kBefore);
      return dq_tile<T, kDim, kDropout, 1, false, true>(p, next);
    });
  }
}

// Of shared memory, for a block.
template<int kDim>
int bytes_of(const AttentionBatch& p) {
  return kTileBytes<kDim> + std::max(ManyBits::kBeside, attention_bytes(p));
}

}  // namespace

bool dq_double_takes(const AttentionBackward& p, const Gpu& gpu) {
  return has_whole_heads(p.batch) && p.batch.head_dim <= kMostColumns &&
         double_tiles_fill(p.batch, gpu) &&
         2 * (bytes_of<kMostColumns>(p.batch) + 1024) <= gpu.shared_memory;
}

cudaError_t launch_dq_double(const AttentionBackward& params, DType dtype, Stream stream) {
  AttentionBackward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = std::min(decltype(dim)::value, kMostColumns);  // no wider ones come
    const dim3 grid = attention_grid(p.batch, kBefore, 2 * kTileRows);
    const auto kernel = p.batch.seed ? attention_backward_dq_double_kernel<T, kDim, true>
                                     : attention_backward_dq_double_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes_of<kDim>(p.batch), stream, p);
  });
}

}  // namespace bertfast
