// The backward on Hopper: dv = (dy weight) * gelu'(u + bias), and its columns' sums for dbias.
//
// Products are those of device/ping_pong.cuh, with a weight whose rows are the inner dimension. A
// bulk copy brings a tile of u into the consumer's two slabs of shared memory while it multiplies;
// then each warp reads its rows of u there, 16 columns at a time, puts dv in their place, and a
// bulk copy writes it. Beyond the tensor's ends u and dy are zeros.
//
// Sums for dbias are float32, of the unrounded dv, in a fixed order: a thread's 4 rows of a tile,
// the 8 threads of a warp that have the same columns, the 4 warps, then the tiles of rows, which
// column_sum.cu adds.
//
// Moves what the other kernel does (by_warps.cu).
#include "device/gelu.cuh"
#include "device/mma.cuh"
#include "device/vec.cuh"
#include "kernels/linear_gelu/kernels.h"
#include "kernels/linear_gelu/ping_pong.cuh"

namespace bertfast {
namespace {

constexpr int kTile = PingPong::kTile;
constexpr int kSumBytes = 2 * kTile * 4;  // of each consumer: those of two warps
constexpr int kSharedBytes = PingPong::kBeside + 2 * kSumBytes;
static_assert(kSharedBytes <= PingPong::kMostBytes, "sums lie beside the barriers");

struct Backward {
  PingPongProduct product;
  TensorMap u, dv;
  const void* bias;
  float* partial_dbias;
  int cols;
};

template<class T, bool kTanh>
class UseBackward {
 public:
  __device__ __forceinline__ explicit UseBackward(const Backward& p) : p_(p) {}

  __device__ __forceinline__ void begin(const PingPongConsumer& me, PingPongTile tile, int) {
    if (!me.copies()) return;
    tma_store_wait_read<0>();  // the slabs are free
    const Mbarriers barriers = shared_memory<uint64_t>(PingPong::kBarriers);
    const int own = PingPong::kOwn + me.number;
    mbarrier_arrive_expecting(barriers, own, 2 * PingPong::kSlabBytes);
    for (int part = 0; part < 2; ++part) {
      tma_load(shared_memory<uint4>(me.slab(part)), p_.u, tile.col + 64 * part, tile.row, 0,
               barriers, own);
    }
  }

  __device__ __forceinline__ void meanwhile(const PingPongConsumer& me, PingPongTile tile) {
    bias_.load(p_.bias, tile.col, p_.cols, me.lane());
  }

  __device__ __forceinline__ void finish(const PingPongConsumer& me, PingPongTile tile, int i,
                                         PingPong::Sums& sums) {
    const int lane = me.lane(), first = me.place();
    float totals[kTile / 32];  // of a column of each 32: 16 (bit 2) + 8 (bit 4) + 2 t + (bit 3)
    mbarrier_wait(shared_memory<uint64_t>(PingPong::kBarriers), PingPong::kOwn + me.number, i & 1);

    // 1. times the slope
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Shared<uint4> slab = shared_memory<uint4>(me.slab(part));
      float of_sixteen[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float total[4] = {};  // of the thread's columns of 16
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int place = (first ^ 2 * n) + half * PingPongConsumer::kHalfChunks;
          unsigned u[4], dv[4];
          ldmatrix(u, slab, place);  // a lane's values lie where it puts its own
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int eight = 8 * part + 2 * n + k / 2;
            const float* const dh = sums[half][eight] + 2 * (k % 2);
            const Vec<T, 2> v{u[k]};
            const float2 bias = bias_.of(eight);
            const float low = dh[0] * Gelu<kTanh, false>::derivative(v[0] + bias.x);
            const float high = dh[1] * Gelu<kTanh, false>::derivative(v[1] + bias.y);
            total[k / 2 * 2] += low;
            total[k / 2 * 2 + 1] += high;
            dv[k] = pack<T>(low, high);
          }
          stmatrix(slab, place, dv);
        }
        const float even = fold(total[0], total[2], lane, 16);
        const float odd = fold(total[1], total[3], lane, 16);
        of_sixteen[n] = fold(even, odd, lane, 8);
      }
      totals[2 * part] = fold(of_sixteen[0], of_sixteen[1], lane, 4);
      totals[2 * part + 1] = fold(of_sixteen[2], of_sixteen[3], lane, 4);
    }
    async_proxy_fence();

    // 2. out, and the other two warps' sums to the first two
    const Shared<float> shared = shared_memory<float>(PingPong::kBeside + me.number * kSumBytes);
    const int column = lane / 4 % 2 * 16 + lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2;
    const int place = me.warp % 2 * kTile + column;
    if (me.warp >= 2) {
#pragma unroll
      for (int k = 0; k < kTile / 32; ++k) shared.store(place + 32 * k, totals[k]);
    }
    named_barrier_sync(me.barrier(), kWarpgroup);
    if (me.copies()) {
      for (int part = 0; part < 2; ++part) {
        tma_store(p_.dv, tile.col + 64 * part, tile.row, 0, shared_memory<uint4>(me.slab(part)));
      }
      tma_store_commit();
    }
    if (!p_.partial_dbias) return;
    if (me.warp < 2) {
#pragma unroll
      for (int k = 0; k < kTile / 32; ++k) {
        shared.store(place + 32 * k, totals[k] + shared.load(place + 32 * k));
      }
    }
    named_barrier_sync(me.barrier(), kWarpgroup);
    const int col = tile.col + me.thread;
    const float sum = shared.load(me.thread) + shared.load(kTile + me.thread);
    if (col < p_.cols) p_.partial_dbias[int64_t(tile.row / kTile) * p_.cols + col] = sum;
  }

  __device__ __forceinline__ void end(const PingPongConsumer& me) {
    if (me.copies()) tma_store_wait_read<0>();
  }

 private:
  // Of two values that two lanes, apart by a bit of their number, have both: the sum of the first
  // ones in the lane without the bit, of the second ones in the other.
  static __device__ __forceinline__ float fold(float first, float second, int lane, int bit) {
    const bool has = lane & bit;
    return (has ? second : first) + __shfl_xor_sync(0xffffffffu, has ? first : second, bit);
  }

  const Backward& p_;
  TileBias<T> bias_;
};

template<class T, bool kTanh>
__global__ void __launch_bounds__(PingPong::kMostThreads, 1)
    linear_gelu_backward_ping_pong_kernel(const __grid_constant__ Backward p) {
#ifdef BERTFAST_PING_PONG
  UseBackward<T, kTanh> use(p);
  ping_pong<T, Major::kOuter>(p.product, use);
#endif
}

}  // namespace

cudaError_t launch_backward_ping_pong(const LinearGeluBackward& of, bool tanh, DType dtype,
                                      const Gpu& gpu, Stream stream, bool* done) {
  const Boxes dy = slabs(of.dy, of.rows, of.inner, of.dy_row_stride, kTile);
  const Boxes weight = slabs(of.weight, of.inner, of.cols, of.weight_row_stride, PingPong::kDepth);
  const Boxes u = slabs(of.u, of.rows, of.cols, of.cols, kTile);
  const Boxes dv = slabs(of.dv, of.rows, of.cols, of.cols, kTile);
  Backward p{};
  *done = split(of.rows, of.inner, of.cols, &p.product) && describes_boxes(dy) &&
          describes_boxes(weight) && describes_boxes(u) && describes_boxes(dv);
  if (!*done) return cudaSuccess;
  p.bias = of.bias;
  p.partial_dbias = of.partial_dbias;
  p.cols = of.cols;
  cudaError_t error = make_tensor_map(&p.product.left, dy);
  if (error == cudaSuccess) error = make_tensor_map(&p.product.right, weight);
  if (error == cudaSuccess) error = make_tensor_map(&p.u, u);
  if (error == cudaSuccess) error = make_tensor_map(&p.dv, dv);
  if (error != cudaSuccess) return error;
  return with_form(dtype, tanh, [&](auto t, auto form) {
    const auto kernel = linear_gelu_backward_ping_pong_kernel<decltype(t), decltype(form)::value>;
    return launch_ping_pong(kernel, gpu, kSharedBytes, stream, p, done);
  });
}

}  // namespace bertfast
