// The forward of forward.cu with 128 queries a block, 32 a warp, by mma.sync: what a warp reads of
// keys and values it multiplies twice, so half as much goes through shared memory. What is written
// has the same bits.
//
// Its blocks are few on a multiprocessor, by their registers, so it is for calls of long sequences
// that fill the GPU. What is left of a sequence, if that is no more than 64 queries, and the tiles
// that short sequences share are done as in forward.cu. Of a plan's list a block has the tiles of a
// long sequence in pairs: the second one of a pair has nothing to do.
//
// Moves 2 + 2 * (tiles of 128) values an element of q, mostly from the second-level cache.
#include <algorithm>

#include "device/attention/forward_tile.cuh"
#include "device/attention/launch.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

constexpr int kBefore = 15;
constexpr int kMost = 3;  // blocks on a multiprocessor, of the narrowest heads

template<int kDim>
constexpr int kTileBytes = Forward<kDim, 2>::kTileBytes;

// For so many blocks there are registers.
template<int kDim, bool kDropout>
constexpr int registers_suffice_for() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return kDim == 32 && kDropout ? kMost : 2;
#else
  return kDim == 32 ? kMost : 2;
#endif
}

template<int kDim, bool kDropout>
constexpr int kBlocks =
    blocks_anywhere(kTileBytes<kDim> + ManyBits::kBeside, registers_suffice_for<kDim, kDropout>());

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kDim, kDropout>)
    attention_forward_double_kernel(AttentionForward p) {
  if constexpr (kDoubleIsUsed) {
    await_earlier_kernels();
    const TilePlace at = find_double_tile(p.batch, 0, kBefore);
    if (at.tile == 2 * kTileRows) {
      forward_tile<T, kDim, kDropout, 2>(p, at);
      return;
    }
    for_each_turn([&](int alone) {
      return forward_tile<T, kDim, kDropout, 1>(p, find_double_tile(p.batch, alone, kBefore));
    });
  }
}

// Of shared memory, for a block.
template<int kDim>
int bytes_of(const AttentionBatch& p) {
  return kTileBytes<kDim> + std::max(ManyBits::kBeside, attention_bytes(p));
}

}  // namespace

bool forward_double_takes(const AttentionForward& p, DType dtype, const Gpu& gpu) {
  return double_tiles_fill(p.batch, gpu) &&
         with_head_dim(dtype, p.batch.head_dim, [&](auto, auto dim) {
           return 2 * (bytes_of<decltype(dim)::value>(p.batch) + 1024) <= gpu.shared_memory;
         });
}

cudaError_t launch_forward_double(const AttentionForward& params, DType dtype, Stream stream) {
  AttentionForward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, kBefore, 2 * kTileRows);
    const auto kernel = p.batch.seed ? attention_forward_double_kernel<T, kDim, true>
                                     : attention_forward_double_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes_of<kDim>(p.batch), stream, p);
  });
}

}  // namespace bertfast
