// attention with a window or a bias by distance (bertfast/ops/attention/scores.py): the forward,
// and the backward's dq and dkv, each of the tile that serves calls without.
//
//   score = scale * q k^T + bias[head, key - query],  -inf outside the window
//
// The backward of rotary positions is here too, but for what the kernels for Hopper and those of
// tiles of 128 do of it: dq and dk are rotated back before they are rounded
// (device/attention/rotary.cuh). Its forward is any kernel's, of a rotated q and k (rotate.cu).
//
// Keys that no query of a tile sees are never visited, nor queries that see none of its keys, and
// what is visited and not seen is masked. A bias comes by way of shared memory, where a warp has
// the distances of its step: scores of one distance read the same number. There are few such
// kernels: for heads of 64 and 128, narrower ones having zeros beside them, and with and without
// dropout in one.
//
// Moves what the other kernels move, of the blocks that are visited, and the bias, mostly from the
// first-level cache.
#include "device/attention/dkv_tile.cuh"
#include "device/attention/dq_tile.cuh"
#include "device/attention/forward_tile.cuh"
#include "device/attention/launch.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

constexpr int kBeside = ManyBits::kBeside + BiasLine::kSharedBytes;
constexpr int kMostBlocks = 2;  // on a multiprocessor, which leaves registers for what is added

template<class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads,
                                  blocks_anywhere(Forward<kDim, 1>::kTileBytes + kBeside,
                                                  kMostBlocks))
    attention_forward_by_position_kernel(AttentionForward p) {
  await_earlier_kernels();
  for_each_turn([&](int alone) {
    return forward_tile<T, kDim, true, 1, true>(p, find_tile(p.batch, alone));
  });
}

template<class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads,
                                  blocks_anywhere(Dq<kDim, 1>::kTileBytes + kBeside, kMostBlocks))
    attention_backward_dq_by_position_kernel(AttentionBackward p) {
  await_earlier_kernels();
  for_each_turn(
      [&](int alone) { return dq_tile<T, kDim, true, 1, true>(p, find_tile(p.batch, alone)); });
}

template<class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads,
                                  blocks_anywhere(Dkv<kDim>::kTileBytes + kBeside, kMostBlocks))
    attention_backward_dkv_by_position_kernel(AttentionBackward p) {
  await_earlier_kernels();
  for_each_turn([&](int alone) {
    return dkv_tile<T, kDim, true, true>(p, [&] { return find_tile(p.batch, alone); });
  });
}

}  // namespace

cudaError_t launch_forward_by_position(const AttentionForward& params, DType dtype, Stream stream) {
  AttentionForward p = params;
  return with_wide_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 15);
    const int bytes = Forward<kDim, 1>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = attention_forward_by_position_kernel<T, kDim>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

cudaError_t launch_dq_by_position(const AttentionBackward& params, DType dtype, Stream stream) {
  AttentionBackward p = params;
  return with_wide_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 15);
    const int bytes = Dq<kDim, 1>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = attention_backward_dq_by_position_kernel<T, kDim>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

cudaError_t launch_dkv_by_position(const AttentionBackward& params, DType dtype, Stream stream) {
  AttentionBackward p = params;
  return with_wide_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 31);
    const int bytes = Dkv<kDim>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = attention_backward_dkv_by_position_kernel<T, kDim>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
