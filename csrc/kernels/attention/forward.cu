// out = dropout(softmax(scale * q k^T)) v, and lse = log2(sum(exp(scale * q k^T))) for the
// backward.
//
// Saved for the backward: q, k, v, out, lse (float32, to base 2; 0 for a row without keys)
// and the seed. No score is stored.
//
// A block has 64 queries of one head, a warp 16 of them: their q as operands, the scores and the
// sums for out stay in registers. Keys and values stream through shared memory in blocks of kKeys,
// two of which are there: while one is worked on the next is copied, with one barrier a block.
// Scores become an operand where they are, as the fragments of a sum and of an operand are the
// same. Products are made by mma.sync or, where there is wgmma and heads have 64 values, by that.
//
// The online softmax: with c = scale * log2 e, m is the largest c * score of a row so far, rounded;
// l is the sum of exp2(c s - m), and the sums hold the sum of exp2(c s - m) v. When m grows both
// are scaled down by exp2 of the difference of the two m. The product is rounded before anything is
// subtracted from it: were it the exact one here and the rounded one there, as by a fused
// multiply-add, large scores would scale by the rounding error. A negative scale is taken to q's
// sign. Dropout acts on what goes into the sums, not on l.
//
// Moves 4 values an element of q (q, k, v read; out written) where a tile holds all queries of a
// sequence, and 2 + 2 * tiles where it doesn't, mostly from the second-level cache.
#include "device/attention/forward_tile.cuh"
#include "device/attention/launch.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

// With wgmma, which reads keys and values itself, registers of heads of 64 suffice for four blocks.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int kNarrow = 64;
#else
constexpr int kNarrow = 32;
#endif
template<int kDim>
constexpr int kBlocks =
    blocks_that_fit(Forward<kDim, 1>::kTileBytes + ManyBits::kBeside, kDim <= kNarrow ? 4
                                                                      : kDim < 128    ? 3
                                                                                      : 2);

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kDim>)
    attention_forward_kernel(AttentionForward p) {
  await_earlier_kernels();
  for_each_turn(
      [&](int alone) { return forward_tile<T, kDim, kDropout, 1>(p, find_tile(p.batch, alone)); });
}

}  // namespace

cudaError_t launch_forward_tiles(const AttentionForward& params, DType dtype, Stream stream) {
  AttentionForward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 15);
    const int bytes = Forward<kDim, 1>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = p.batch.seed ? attention_forward_kernel<T, kDim, true>
                                     : attention_forward_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
