// The forward on Hopper: u = x weight^T, rounded, and y = gelu(u + bias).
//
// Products are those of device/ping_pong.cuh. A consumer rounds its sums to u in registers, where
// they lie, adds the bias that it has loaded meanwhile, and puts u and y into a slab of shared
// memory each, 64 columns at a time, from where a bulk copy writes them: whole rows of 128 bytes,
// and nothing beyond the tensor's ends.
//
// Moves what the other kernel does (by_warps.cu).
#include "device/gelu.cuh"
#include "device/mma.cuh"
#include "device/vec.cuh"
#include "kernels/linear_gelu/kernels.h"
#include "kernels/linear_gelu/ping_pong.cuh"

namespace bertfast {
namespace {

struct Forward {
  PingPongProduct product;
  TensorMap y, u;
  const void* bias;
  int cols;
  bool saves;  // u
};

template<class T, bool kTanh>
class UseForward {
 public:
  __device__ __forceinline__ explicit UseForward(const Forward& p) : p_(p) {}

  __device__ __forceinline__ void begin(const PingPongConsumer& me, PingPongTile, int) {
    if (me.copies()) tma_store_wait_read<0>();  // the slabs are free
  }

  __device__ __forceinline__ void meanwhile(const PingPongConsumer& me, PingPongTile tile) {
    bias_.load(p_.bias, tile.col, p_.cols, me.lane());
  }

  __device__ __forceinline__ void finish(const PingPongConsumer& me, PingPongTile tile, int,
                                         PingPong::Sums& sums) {
    const Shared<uint4> u = shared_memory<uint4>(me.slab(0)), y = shared_memory<uint4>(me.slab(1));
    const int first = me.place();
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // 64 columns
      // The slabs are free again. At first the turn has said so.
      if (part > 0) named_barrier_sync(me.barrier(), kWarpgroup);
#pragma unroll
      for (int n = 0; n < 4; ++n) {  // 16 of them
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unsigned rounded[4], out[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // 8 columns, then 8 rows
            const int eight = 8 * part + 2 * n + i / 2;
            const float* const two = sums[half][eight] + 2 * (i % 2);
            const Vec<T, 2> v{pack<T>(two[0], two[1])};
            const float2 bias = bias_.of(eight);
            rounded[i] = v.bits;
            out[i] = pack<T>(Gelu<kTanh, false>::value(v[0] + bias.x),
                             Gelu<kTanh, false>::value(v[1] + bias.y));
          }
          const int place = (first ^ 2 * n) + half * PingPongConsumer::kHalfChunks;
          if (p_.saves) stmatrix(u, place, rounded);
          stmatrix(y, place, out);
        }
      }
      async_proxy_fence();
      named_barrier_sync(me.barrier(), kWarpgroup);  // all is there
      if (me.copies()) {
        const int col = tile.col + 64 * part;
        if (p_.saves) tma_store(p_.u, col, tile.row, 0, u);
        tma_store(p_.y, col, tile.row, 0, y);
        tma_store_commit();
        if (part == 0) tma_store_wait_read<0>();  // of these columns
      }
    }
  }

  __device__ __forceinline__ void end(const PingPongConsumer& me) {
    if (me.copies()) tma_store_wait_read<0>();
  }

 private:
  const Forward& p_;
  TileBias<T> bias_;
};

template<class T, bool kTanh>
__global__ void __launch_bounds__(PingPong::kMostThreads, 1)
    linear_gelu_forward_ping_pong_kernel(const __grid_constant__ Forward p) {
#ifdef BERTFAST_PING_PONG
  UseForward<T, kTanh> use(p);
  ping_pong<T, Major::kInner>(p.product, use);
#endif
}

}  // namespace

cudaError_t launch_forward_ping_pong(const LinearGeluForward& of, bool tanh, DType dtype,
                                     const Gpu& gpu, Stream stream, bool* done) {
  const Boxes x = slabs(of.x, of.rows, of.inner, of.x_row_stride, PingPong::kTile);
  const Boxes weight = slabs(of.weight, of.cols, of.inner, of.weight_row_stride, PingPong::kTile);
  const Boxes y = slabs(of.y, of.rows, of.cols, of.cols, PingPong::kTile);
  const Boxes u = slabs(of.u, of.rows, of.cols, of.cols, PingPong::kTile);
  Forward p{};
  *done = split(of.rows, of.inner, of.cols, &p.product) && describes_boxes(x) &&
          describes_boxes(weight) && describes_boxes(y);
  if (!*done) return cudaSuccess;
  p.bias = of.bias;
  p.cols = of.cols;
  p.saves = of.u != nullptr;
  cudaError_t error = make_tensor_map(&p.product.left, x);
  if (error == cudaSuccess) error = make_tensor_map(&p.product.right, weight);
  if (error == cudaSuccess) error = make_tensor_map(&p.y, y);
  if (error == cudaSuccess && p.saves) error = make_tensor_map(&p.u, u);
  if (error != cudaSuccess) return error;
  return with_form(dtype, tanh, [&](auto t, auto form) {
    const auto kernel = linear_gelu_forward_ping_pong_kernel<decltype(t), decltype(form)::value>;
    return launch_ping_pong(kernel, gpu, PingPong::kBeside, stream, p, done);
  });
}

}  // namespace bertfast
