// dq, the gradient of attention's queries, and what the kernel for dk and dv needs of each row.
//
// With p = exp2(scale * log2 e * q k^T - lse) computed again, drops drawn again, z the dropout's
// factor of each score (0 or keep_scale) and < > the sum over a row's keys:
//   dp = z * (dout v^T),  delta = <p dp> = <dout * out over the head>
//   ds = p * (dp - delta),  dq = scale * ds k
// keep_scale is taken out: everything is computed without it and multiplied at the end, with
// delta / keep_scale in delta's place.
//
// A block has 64 queries and runs over the keys, as the forward does; it keeps q and dout as
// operands in registers and streams keys and values through two stages of shared memory. It sums
// delta, since it has dout and its rows at hand, and leaves delta and lse as pairs for
// backward_dkv.cu, whose kernel runs after this one. No atomics and no sums between warps.
//
// Moves 6 values an element of q and more (dout, out, q; k, v for each tile; dq), mostly from the
// second-level cache.
#include "device/attention/dq_tile.cuh"
#include "device/attention/launch.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

template<int kDim>
constexpr int kBlocks =
    blocks_that_fit(Dq<kDim, 1>::kTileBytes + ManyBits::kBeside, kDim <= 64 ? 3 : 2);

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kDim>)
    attention_backward_dq_kernel(AttentionBackward p) {
  await_earlier_kernels();
  for_each_turn(
      [&](int alone) { return dq_tile<T, kDim, kDropout, 1>(p, find_tile(p.batch, alone)); });
}

}  // namespace

cudaError_t launch_dq_tiles(const AttentionBackward& params, DType dtype, Stream stream) {
  AttentionBackward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 15);
    const int bytes = Dq<kDim, 1>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = p.batch.seed ? attention_backward_dq_kernel<T, kDim, true>
                                     : attention_backward_dq_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
