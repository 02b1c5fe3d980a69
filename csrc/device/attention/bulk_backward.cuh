// What the two kernels of attention's backward for Hopper share: the two tiles of a block, where
// all lies in shared memory, and which rows of a streamed block count.
//
// A block has two tiles of 64 rows of one sequence, each a warpgroup's, and streams blocks of the
// other side's tensors to both. Of a tile that several sequences share there is one, the first
// warpgroup's, and so of a sequence's last rows.
#pragma once

#include "device/attention/launch.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/stream.cuh"
#include "device/attention/turns.cuh"

namespace bertfast {

// streamed: keys and values, or queries and dout.
template<int kDim>
struct BulkBackward : AttentionBackward {
  HeadBoxes<kDim> streamed[2];
};

// Bits of a block's 64 rows.
using BlockBits = unsigned[2];

template<int kDim>
struct BulkTiles {
  using Stream = BlockStream<kDim>;
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kRows = kWarpgroups * kTileRows;
  // Compiled for others than sm_90a the kernels are empty, and tell launches so by a smaller bound.
#if defined(BERTFAST_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static constexpr int kMostThreads = kThreads;
#else
  static constexpr int kMostThreads = 32;
#endif

  // In shared memory: the tiles, the stream, and for each warpgroup where its tile lies.
  static constexpr int kTileBytes = HeadBoxes<kDim>::kBytes;
  static constexpr int kStream = 2 * kWarpgroups * kTileBytes;
  static constexpr int kBarriers = kStream + Stream::kBytes;
  static constexpr int kPlaces = kBarriers + Stream::kBarrierBytes;
  static constexpr int kManyBits = kPlaces + kWarpgroups * TilePlace::kSharedBytes;
  static constexpr int kVotes = kManyBits + ManyBits::kSharedBytes;
  // lse and delta of two blocks of queries, for each warpgroup.
  static constexpr int kStatistics = kVotes + 16;
  static constexpr int kStatisticsBytes = 2 * kTileRows * int(sizeof(float2));
  static constexpr int kKeys = kStatistics + kWarpgroups * kStatisticsBytes;
  static int shared_bytes(const AttentionBatch& p) {
    return kKeys + (p.key_mask ? Keys::shared_bytes(p.length, kThreads / 32) : 0);
  }
  // Of the two tensors' tiles of a warpgroup.
  static __device__ __forceinline__ int tile(int warpgroup, int part) {
    return (2 * warpgroup + part) * kTileBytes;
  }

  // Barriers: of all warpgroups, and of this thread's.
  static constexpr int kOfAll = 1;
  __device__ __forceinline__ int of_group() const { return 2 + group; }

  int warpgroups;  // that have a tile
  int group;       // this thread's
  Stream stream{kStream, kBarriers};

  // Whether a block has no tile: it lies behind its sequence, or a plan's tile belongs to the block
  // of the tile before it.
  static __device__ __forceinline__ bool none(const AttentionBatch& p, const TilePlace& at) {
    if (p.tiles && at.many == 1 && at.first / kTileRows % 2 != 0) return true;
    return at.first >= at.length && !p.key_mask;
  }

  // at: the first tile; it becomes this warpgroup's. All threads make the barriers known.
  __device__ __forceinline__ BulkTiles(TilePlace& at)
      : warpgroups(at.many == 1 && at.first + kTileRows < at.length ? 2 : 1),
        group(warp_uniform(int(threadIdx.x) / kWarpgroup)) {
    // A warp knows that its own products have read a block.
    if (threadIdx.x == 0) stream.init(warpgroups * (kWarpgroup / 32));
    __syncthreads();
    at.first += group * kTileRows;
  }

  // The tile of a tensor, in which source(r) is the row at place r and zero unless inside(it).
  template<class T, class Source, class Inside>
  __device__ __forceinline__ void start_copy(int part, const HeadRows<const void>& x,
                                             const AttentionBackward& p, const TilePlace& at,
                                             int thread, Source source, Inside inside) const {
    const T* const rows = row_of<const T>(x, at, at.first);
    for_each_slab<kDim>([&](auto slab) {
      using S = decltype(slab);
      using Copies = typename S::Rows::template Copies<kTileRows, kWarpgroup, T>;
      Copies(rows + S::kColumn, x.token, p.batch.head_dim - S::kColumn, thread)
          .start_permuted(shared_memory<uint4>(tile(group, part) + S::kByte), source, inside);
    });
  }

  // Rounds sums of the tile's rows, by way of the place of one of its tensors. As Tile::store.
  template<class T, class Target, class Inside, class Counts>
  __device__ __forceinline__ void store(int part, const float (&sums)[kDim / 8][4], float factor,
                                        const HeadRows<void>& x, const AttentionBackward& p,
                                        const TilePlace& at, int thread, Target target,
                                        Inside inside, Counts counts) const {
    T* const rows = row_of<T>(x, at, at.first);
    for_each_slab<kDim>([&](auto slab) {
      using S = decltype(slab);
      float columns[S::Rows::kChunks][4] = {};
#pragma unroll
      for (int n = 0; n < min(S::Rows::kChunks, (kDim - S::kColumn) / 8); ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) columns[n][i] = sums[S::kColumn / 8 + n][i];
      }
      S::Rows::store(shared_memory<uint4>(tile(group, part) + S::kByte), columns, factor, factor,
                     rows + S::kColumn, x.token, p.batch.head_dim - S::kColumn, thread, target,
                     inside, counts);
    });
  }

  // The tile of a tensor as wgmma reads it.
  __device__ __forceinline__ uint64_t matrix(int part) const {
    constexpr int kRowBytes = 2 * HeadBoxes<kDim>::kColumns;
    const Shared<uint4> first = shared_memory<uint4>(tile(group, part));
    return wgmma_further(wgmma_matrix<kRowBytes>(first, 0), 0);
  }

  // s = tile rows^T, with the rows of a block's part from `row` on: as many as s has columns.
  template<class T, int kEights>
  __device__ __forceinline__ void multiply_scores(float (&s)[kEights][4], uint64_t tile, int part,
                                                  int block, int row = 0) const {
    for_each_slab<kDim>([&](auto slab) {
      using S = decltype(slab);
      constexpr int kRowBytes = S::Rows::kRowBytes;
      const uint64_t a = wgmma_further(tile, S::kByte);
      const uint64_t b = wgmma_further(stream.matrix(block, part, slab), row * kRowBytes);
#pragma unroll
      for (int step = 0; step < min(S::Rows::kChunks, (kDim - S::kColumn) / 8) / 2; ++step) {
        const int byte = step * kWgmmaStep<kRowBytes, Major::kInner>;
        wgmma<T, Major::kInner, Major::kInner>(s, wgmma_further(a, byte), wgmma_further(b, byte),
                                               S::kColumn > 0 || step > 0);
      }
    });
  }

  // sums += operands rows, with the rows of a block's part from `row` on.
  template<class T, int kOperands>
  __device__ __forceinline__ void add_product(float (&sums)[kDim / 8][4],
                                              const unsigned (&operands)[kOperands][4], int part,
                                              int block, int row = 0) const {
    constexpr int kRowBytes = 2 * HeadBoxes<kDim>::kColumns;
    const uint64_t b = wgmma_further(stream.matrix(block, part), row * kRowBytes);
#pragma unroll
    for (int step = 0; step < kOperands; ++step) {
      const int byte = step * kWgmmaStep<kRowBytes, Major::kOuter>;
      wgmma<T, Major::kOuter>(sums, operands[step], wgmma_further(b, byte), true);
    }
  }

  // Makes zeros of the rows of a part of a block, which has come, whose bits are 0.
  __device__ __forceinline__ void zero_rows(int block, int part, const BlockBits& bits) const {
    stream.zero_rows(block, part, bits, int(threadIdx.x), warpgroups * kWarpgroup);
  }
  // Lets wgmma read them.
  __device__ __forceinline__ void zeroed() const {
    async_proxy_fence();
    named_barrier_sync(kOfAll, warpgroups * kWarpgroup);
  }

  // As spoilt, of the first warpgroup alone.
  __device__ __forceinline__ bool spoilt(const TilePlace& at, bool finite, int thread) const {
    if (at.many == 1 || at.alone != 0) return false;
    const Shared<int> votes = shared_memory<int>(kVotes);
    const bool found = __any_sync(0xffffffffu, !finite);
    if (thread % 32 == 0) votes.store(thread / 32, found);
    named_barrier_sync(of_group(), kWarpgroup);
    int any = 0;
#pragma unroll
    for (int warp = 0; warp < kWarpgroup / 32; ++warp) any |= votes.load(warp);
    return any != 0;
  }

  // As turn_after.
  __device__ __forceinline__ int turn_after(const AttentionBatch& p, const TilePlace& at) const {
    if (at.alone == 0) return 0;
    // The next one overwrites what others may still read.
    named_barrier_sync(of_group(), kWarpgroup);
    return next_alone(p, at);
  }
};

// before: as attention_grid has it.
template<int kDim>
cudaError_t launch_bulk(void (*kernel)(BulkBackward<kDim>), const AttentionBackward& params,
                        const HeadRows<const void> (&streamed)[2], int before, Stream stream) {
  using Tiles = BulkTiles<kDim>;
  BulkBackward<kDim> p{params, {}};
  for (int part = 0; part < 2; ++part) {
    const cudaError_t error = make_head_boxes<kDim>(&p.streamed[part], streamed[part], p.batch);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid = attention_grid(p.batch, before, Tiles::kRows);
  return launch_early(kernel, grid, dim3(Tiles::kThreads), Tiles::shared_bytes(p.batch), stream, p);
}

// Calls use(T(), kDim) for the head dimensions of these kernels.
template<class Use>
cudaError_t with_bulk_dim(DType dtype, int head_dim, Use use) {
  const auto with_dim = [&](auto t) {
    if (head_dim <= 32) return use(t, std::integral_constant<int, 32>());
    if (head_dim <= 64) return use(t, std::integral_constant<int, 64>());
    if (head_dim <= 96) return use(t, std::integral_constant<int, 96>());
    return use(t, std::integral_constant<int, 128>());
  };
  return dtype == DType::kFloat16 ? with_dim(__half()) : with_dim(__nv_bfloat16());
}

}  // namespace bertfast
