// dk and dv, the gradients of attention's keys and values. backward_dq.cu has run before, and left
// lse and delta of each row.
//
// In its words: dv = (z p)^T dout,  dk = scale * ds^T q
// keep_scale is taken out here too.
//
// A block has 64 keys, 16 a warp, and runs over the queries. It computes the transposed scores,
// keys as rows: then p and ds are operands where they are, and dk and dv stay in registers. It
// keeps its keys and values as operands in registers (only up to 64 columns) and streams queries
// and dout through two stages of shared memory. No atomics and no sums between warps: every
// gradient is written once, by one warp, in a fixed order.
//
// Moves 6 values an element of q and more (k, v; dout, q for each tile; dk, dv), mostly from the
// second-level cache.
#include "device/attention/dkv_tile.cuh"
#include "device/attention/launch.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

template<int kDim>
constexpr int kBlocks =
    blocks_that_fit(Dkv<kDim>::kTileBytes + ManyBits::kBeside, kDim <= 64 ? 3 : 2);

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, kBlocks<kDim>)
    attention_backward_dkv_kernel(AttentionBackward p) {
  await_earlier_kernels();
  for_each_turn([&](int alone) {
    return dkv_tile<T, kDim, kDropout>(p, [&] { return find_tile(p.batch, alone); });
  });
}

}  // namespace

cudaError_t launch_dkv_tiles(const AttentionBackward& params, DType dtype, Stream stream) {
  AttentionBackward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 31);
    const int bytes = Dkv<kDim>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = p.batch.seed ? attention_backward_dkv_kernel<T, kDim, true>
                                     : attention_backward_dkv_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
