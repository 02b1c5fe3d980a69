// The forward of forward.cu for Hopper, whose keys and values are brought by bulk copies and
// multiplied by wgmma: for sequences of more than 128 tokens.
//
// A block has 128 queries of one head, a warpgroup 64 of them: their q as operands, the scores and
// the sums for out stay in registers. 64 keys and their values are a block of the stream that both
// read, each at its own pace, so that the softmax of one falls into the products of the other, or
// of a multiprocessor's other block. The product for the next scores goes on beside that with the
// values, and one wait is for both.
//
// A copy brings 64 rows, whatever they are. Scores of keys that don't count become -inf, and their
// values are overwritten by zeros, as 0 times a NaN is one.
//
// Of a plan's list a block has the tiles of a long sequence in pairs: the second one of a pair has
// nothing to do. A tile that short sequences share is the first warpgroup's.
//
// Moves 2 + 2 * (tiles of 128) values an element of q, mostly from the second-level cache.
#include "device/attention/launch.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/softmax.cuh"
#include "device/attention/stream.cuh"
#include "device/attention/turns.cuh"
#include "device/earlier.cuh"
#include "device/reduce.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

constexpr int kGroups = 2;  // warpgroups of a block
constexpr int kWarps = 4 * kGroups;
constexpr int kThreads = kGroups * kWarpgroup;
constexpr int kRows = kGroups * kTileRows;
constexpr int kAll = 1, kOfOne = 2;  // named barriers: the working warpgroups', and one for each
#if defined(BERTFAST_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BERTFAST_FORWARD_BULK
constexpr int kMostThreads = kThreads;
#else
constexpr int kMostThreads = 32;  // an empty kernel can't be launched: has_code
#endif

template<int kDim>
struct BulkForward : AttentionForward {
  HeadBoxes<kDim> boxes_of_q, boxes_of_k, boxes_of_v;
};

// Shared memory: the queries, the stream's stages, and what else there is.
template<int kDim>
struct Layout {
  using Stream = BlockStream<kDim>;
  static constexpr int kBox = HeadBoxes<kDim>::kBytes;
  static constexpr int kStream = kGroups * kBox;
  static constexpr int kPlace = kStream + Stream::kBytes;
  static constexpr int kBarriers = kPlace + TilePlace::kSharedBytes;
  static constexpr int kQueries = kBarriers + Stream::kBarrierBytes;  // where they arrive
  static constexpr int kOrigin = kQueries + 16;
  static constexpr int kManyBits = kOrigin + 16;
  static constexpr int kMask = kManyBits + ManyBits::kSharedBytes;
  // Two blocks of wider heads have neither the registers nor the shared memory.
  static constexpr int kBlocks = kDim <= 64 ? 2 : 1;
};

#ifdef BERTFAST_FORWARD_BULK

// Of a product over a head's columns, 16 at a time, those steps that lie in a slab.
template<int kDim, class S>
constexpr int steps_in(S) {
  return (kDim - S::kColumn < 64 ? kDim - S::kColumn : 64) / 16;
}

// A tile, or with kAlone the sequence of a shared one that is to be done alone; returns which one
// is next. turn: how many came before.
template<class T, int kDim, bool kDropout, bool kAlone>
__device__ __forceinline__ int forward_tile(const BulkForward<kDim>& p, int alone, int turn) {
  using In = Layout<kDim>;
  using Stream = typename In::Stream;
  constexpr int kKeys = Stream::kRows;
  const int thread = anew(int(threadIdx.x)) & (kThreads - 1);
  const int number = warp_uniform(thread / 32);  // of the warp
  const int group = number / 4, warp = number % 4, g = thread % 32 / 4, t = thread % 4;

  // 1. where the tile lies, which keys count
  TilePlace at = find_tile<kRows>(p.batch, alone);
  if (at.many == 1 && at.first % kRows != 0) return 0;  // the second one of a pair
  if (at.first >= at.length && !p.batch.key_mask) return 0;
  const Keys keys(p.batch, at, In::kMask, thread, kWarps);
  // Dropout counts from the first key that counts: fragments must start at multiples of 16 from it.
  if (kDropout) at.first -= -keys.low & 15;
  if (at.first >= at.length) return 0;
  const int blocks = warp_uniform((keys.high - keys.low + kKeys - 1) / kKeys);
  const int groups = warp_uniform(at.first + kTileRows < at.length ? 2 : 1);  // that have queries

  // 2. start copying the queries, and as many keys and values as there is room for
  const Stream stream{In::kStream, In::kBarriers};
  const Mbarriers queries = shared_memory<uint64_t>(In::kQueries);
  // Of the one lane that starts copies: where the streamed rows lie.
  const Shared<int4> origin = shared_memory<int4>(In::kOrigin);
  const auto load = [&](int block) {
    const int4 from = origin.load(0);
    const int rows[2] = {from.y, from.z};
    stream.load(p.boxes_of_k, p.boxes_of_v, from.x, rows, block);
  };
  if (number == 0 && elect_one()) {
    origin.store(
        0, make_int4(at.head, p.boxes_of_k.row(at, keys.low), p.boxes_of_v.row(at, keys.low), 0));
    if (!kAlone) {
      mbarrier_init(queries, 0, 1);
      stream.init(groups);
    }
    if (blocks > 0) {
      mbarrier_arrive_expecting(queries, 0, groups * In::kBox);
      for (int i = 0; i < groups; ++i) {
        const int row = p.boxes_of_q.row(at, at.first + i * kTileRows);
        p.boxes_of_q.load(i * In::kBox, row, at.head, queries, 0);
      }
    }
    for (int block = 0; block < Stream::kStages && block < blocks; ++block) load(block);
  }
  at.put(In::kPlace, thread);
  const ScoreDropout dropout(p.batch, at, kDropout, In::kPlace, thread);
  __syncthreads();  // the barriers are made, and what draws need is there
  const bool works = group < groups;
  if (at.many > 1 && works) {
    const int row = 16 * warp + g;
    ManyBits::find<kDropout, false>(p.batch, at, dropout, row, row + 8, thread)
        .put(In::kManyBits, thread);
  }

  // 3. over the keys
  OnlineSoftmax softmax;
  float sums[kDim / 8][4] = {};
  if (works && blocks > 0) {
    mbarrier_wait(queries, 0, turn & 1);
    unsigned q[kDim / 16][4];
    const unsigned sign = p.batch.scale < 0.f ? 0x80008000u : 0u;
    for_each_slab<kDim>([&](auto slab) {
      using S = decltype(slab);
      const Shared<uint4> tile = shared_memory<uint4>(group * In::kBox + S::kByte);
#pragma unroll
      for (int k = 0; k < steps_in<kDim>(slab); ++k) {
        unsigned (&a)[4] = q[S::kColumn / 16 + k];
        S::Rows::load_a(a, tile, 16 * warp, k, thread);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] ^= sign;
      }
    });
    const float c = fmaxf(fabsf(p.batch.scale) * kLog2E, 0x1p-126f);
    const int query_call =
        ScoreDropout::query_call(at.first - keys.low + kTileRows * group + 16 * warp + g);

    // s = q keys^T, once it has been waited for
    float s[kKeys / 8][4];
    const auto start_scores = [&](int block) {
      stream.wait(block, turn);
      wgmma_fence();
      for_each_slab<kDim>([&](auto slab) {
        using S = decltype(slab);
        const uint64_t keys_of_slab = stream.matrix(block, 0, slab);
#pragma unroll
        for (int k = 0; k < steps_in<kDim>(slab); ++k) {
          const int byte = k * kWgmmaStep<S::Rows::kRowBytes, Major::kInner>;
          wgmma<T, Major::kInner>(s, q[S::kColumn / 16 + k], wgmma_further(keys_of_slab, byte),
                                  S::kColumn + k > 0);
        }
      });
      wgmma_commit();
    };
    // sums += a values, once it has been waited for
    const auto start_values = [&](const unsigned (&a)[kKeys / 16][4], int block) {
      wgmma_fence();
      const uint64_t values = stream.matrix(block, 1);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        const int byte = k * kWgmmaStep<2 * HeadBoxes<kDim>::kColumns, Major::kOuter>;
        wgmma<T, Major::kOuter>(sums, a[k], wgmma_further(values, byte), true);
      }
      wgmma_commit();
    };

    const auto step = [&](int block, auto last) {
      constexpr bool kLast = decltype(last)::value;
      // 3a. scores of keys that don't count, whose values become zeros
      TilePlace tile = at;
      if (!kLast) tile.many = 1;  // a shared tile is one block of keys
      if (kLast || keys.masked) {
        const KeyBits<kKeys> on(keys, block);
#pragma unroll
        for (int half = 0; half < kKeys / 32; ++half) {
          const int place = block * kKeys / 32 + half;
          mask_keys(s + 4 * half, -INFINITY, on.words[half], tile, In::kManyBits, place, thread);
        }
        if ((on.words[0] & on.words[1]) != 0xffffffffu) {
          stream.zero_rows(block, 1, on.words, thread, groups * kWarpgroup);
          async_proxy_fence();
          named_barrier_sync(kAll, groups * kWarpgroup);
        }
      }

      // 3b. probabilities, and dropout
      softmax.next(s, c);
      softmax.scale(sums);
      if constexpr (kDropout) {
#pragma unroll
        for (int half = 0; half < kKeys / 32; ++half) {
          const int place = block * kKeys / 32 + half;
          drop_keys(s + 4 * half, dropout, query_call, tile, In::kManyBits, place, thread);
        }
      }

      // 3c. times the values, beside the next scores
      unsigned a[kKeys / 16][4];
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) as_operand<T>(a[i], s[2 * i], s[2 * i + 1]);
      start_values(a, block);
      if (!kLast) start_scores(block + 1);
      wgmma_wait<0>();
      if (kLast) return;

      // 3d. the block is read; the one before it is replaced, once it is in the others too
      if (warp == 0 && elect_one()) stream.release(block);
      const int next = block - 1 + Stream::kStages;
      if (number == 0 && block > 0 && next < blocks) {
        stream.wait_released(block - 1);
        if (elect_one()) load(next);
      }
    };
    start_scores(0);
    wgmma_wait<0>();
#pragma unroll 1
    for (int block = 0; !kAlone && block + 1 < blocks; ++block) step(block, std::false_type());
    step(blocks - 1, std::true_type());
  }

  // 4. normalise and write, unless somebody's NaN or infinity is in others' sums
  const TilePlace to = TilePlace::get(p.batch, In::kPlace);
  if (to.many > 1) async_proxy_fence();  // what comes next is copied to the same places
  if (spoilt(to, all_finite(sums))) return next_alone(p.batch, to);
  if (works) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float l = lane_sum<4>(softmax.l[r]);
      const bool empty = l == 0.f;
      factor[r] = empty ? 0.f : p.batch.keep_scale / l;
      const int row = kTileRows * group + 16 * warp + g + 8 * r;
      if (p.lse && t == 0 && to.inside(row)) {
        p.lse[statistics_of(p.batch, to, to.first + row)] =
            empty ? 0.f : softmax.m[r] + log2_approx(l);
      }
    }
    // By way of the place of its queries, which of narrow heads is each warp's own.
    if (kDim > 64) {
      named_barrier_sync(kOfOne + group, kWarpgroup);
    } else {
      __syncwarp();
    }
    Tile<kDim>::store(
        shared_memory<uint4>(group * In::kBox), sums, factor[0], factor[1],
        row_of<T>(p.out, to, to.first), p.out.token, p.batch.head_dim, thread % kWarpgroup,
        [&](int row) { return kTileRows * group + row; }, [&](int row) { return to.inside(row); },
        [](int) { return true; });
  }
  if (to.many > 1) async_proxy_fence();
  return turn_after(p.batch, to);
}

#endif

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kMostThreads, Layout<kDim>::kBlocks)
    attention_forward_bulk_kernel(const __grid_constant__ BulkForward<kDim> p) {
#ifdef BERTFAST_FORWARD_BULK
  await_earlier_kernels();
  int alone = forward_tile<T, kDim, kDropout, false>(p, 0, 0);
  for (int turn = 1; alone > 0; ++turn) {
    alone = forward_tile<T, kDim, kDropout, true>(p, alone, turn);
  }
#endif
}

}  // namespace

bool forward_bulk_takes(const AttentionForward& p, const Gpu& gpu) {
  if (gpu.capability != 90 || p.batch.length <= kRows || p.batch.tile != kTileRows) return false;
  for (const HeadRows<const void>* x : {&p.q, &p.k, &p.v}) {
    Boxes boxes;
    int sequence;
    if (!describe_heads(&boxes, &sequence, *x, p.batch)) return false;
  }
  return has_code(attention_forward_bulk_kernel<__half, 64, false>, kThreads);
}

cudaError_t launch_forward_bulk(const AttentionForward& params, DType dtype, Stream stream) {
  return with_head_dim(dtype, params.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    using In = Layout<kDim>;
    BulkForward<kDim> p{params};
    cudaError_t error = make_head_boxes(&p.boxes_of_q, p.q, p.batch);
    if (error == cudaSuccess) error = make_head_boxes(&p.boxes_of_k, p.k, p.batch);
    if (error == cudaSuccess) error = make_head_boxes(&p.boxes_of_v, p.v, p.batch);
    if (error != cudaSuccess) return error;
    p.batch.tile = kRows;
    const dim3 grid = attention_grid(p.batch, 15, kRows);
    int bytes = In::kMask;
    if (p.batch.tiles) bytes += Keys::shared_bytes(kTileRows, kWarps);
    if (p.batch.key_mask) bytes += Keys::shared_bytes(p.batch.length, kWarps);
    const auto kernel = p.batch.seed ? attention_forward_bulk_kernel<T, kDim, true>
                                     : attention_forward_bulk_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
