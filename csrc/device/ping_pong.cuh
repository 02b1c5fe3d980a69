// The main loop of a matrix product on Hopper, by blocks that stay for many tiles of its sums: bulk
// copies bring the operands, wgmma multiplies them.
//
// A block has three warpgroups and takes every gridDim.x-th tile of 128 x 128 sums. One is the
// producer: a thread of it copies 64 values of the inner dimension at a time, of 128 rows of either
// operand, into five stages. The other two are consumers, which make whole tiles by turns: while
// one goes on with its sums in registers the other one multiplies. So what follows a product costs
// no time as long as it takes less than the product. The producer gives its registers to them.
//
// A consumer's turn to multiply comes when the other one has started its tile's last product. Which
// block makes a tile, and when, changes no sum: its products are added in the order of the inner
// dimension. Outside the operands bulk copies bring zeros.
#pragma once

#include "device/earlier.cuh"
#include "device/tma.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"

// Kernels of it are empty where they are compiled for anything else than sm_90a.
#if defined(BERTFAST_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BERTFAST_PING_PONG
#endif

namespace bertfast {

struct PingPong {
  static constexpr int kTile = 128;  // rows, and columns
  static constexpr int kDepth = 64;  // of a stage
  static constexpr int kStages = 5;
  static constexpr int kThreads = 3 * kWarpgroup;
#ifdef BERTFAST_PING_PONG
  static constexpr int kMostThreads = kThreads;
#else
  static constexpr int kMostThreads = 32;  // by which has_code knows an empty kernel
#endif
  static constexpr int kAtLaunch = 168, kOfProducer = 40, kOfConsumer = 232;  // registers

  // Shared memory. A slab has 64 columns of a tile's 128 rows, or the same of an operand; each
  // consumer has two for what it writes.
  static constexpr int kRowBytes = 2 * kDepth;
  static constexpr int kHalfBytes = 64 * kRowBytes;
  static constexpr int kSlabBytes = 2 * kHalfBytes;
  static constexpr int kStageBytes = 2 * kSlabBytes;
  static constexpr int kOut = kStages * kStageBytes;
  static constexpr int kBarriers = kOut + 4 * kSlabBytes;
  static constexpr int kBeside = kBarriers + 128;
  static constexpr int kMostBytes = 227 * 1024;

  // mbarriers: stages that are full, stages that are empty, and one for each consumer.
  static constexpr int kFull = 0, kEmpty = kStages, kOwn = 2 * kStages;
  static_assert(8 * (kOwn + 2) <= kBeside - kBarriers, "mbarriers fit their place");
  // Named barriers, of each consumer: for its turn, and for itself.
  static constexpr int kTurnBarrier = 1, kOwnBarrier = 3;

  using Sums = float[2][kTile / 8][4];  // of the upper and of the lower 64 rows, as wgmma has them
};

// What the main loop reads, and how many tiles and steps there are.
struct PingPongProduct {
  TensorMap left;   // (rows, inner)
  TensorMap right;  // (columns, inner) with Major::kInner, (inner, columns) with Major::kOuter
  int row_tiles;
  int col_tiles;
  int steps;  // along the inner dimension
};

struct PingPongTile {
  int row, col;  // the first ones

  // Blocks that run at the same time share what they read: numbers walk down up to eight tiles of
  // rows before they go on to the next columns.
  __device__ __forceinline__ PingPongTile(const PingPongProduct& p, int number) {
    constexpr unsigned kHigh = 8;
    const unsigned in_group = kHigh * unsigned(p.col_tiles), group = unsigned(number) / in_group;
    const unsigned within = unsigned(number) - group * in_group;
    const unsigned high = min(kHigh, unsigned(p.row_tiles) - kHigh * group);
    const unsigned across = high == kHigh ? within / kHigh : within / high;
    row = int(kHigh * group + within - across * high) * PingPong::kTile;
    col = int(across) * PingPong::kTile;
  }
};

// A stage and how often all of them have been passed.
struct PingPongPlace {
  int stage, parity;

  __device__ __forceinline__ explicit PingPongPlace(unsigned step)
      : stage(int(step % PingPong::kStages)), parity(int(step / PingPong::kStages & 1)) {}
  __device__ __forceinline__ void advance() {
    if (++stage == PingPong::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A consumer: 128 threads.
struct PingPongConsumer {
  int number;       // 0 or 1
  unsigned thread;  // of the 128
  int warp;         // of the 4

  __device__ __forceinline__ PingPongConsumer()
      : number(warp_uniform(int(threadIdx.x / kWarpgroup)) - 1),
        thread(threadIdx.x % kWarpgroup),
        warp(warp_uniform(int(thread / 32))) {}

  __device__ __forceinline__ int lane() const { return int(thread % 32); }
  // True in the one thread that starts the consumer's own copies.
  __device__ __forceinline__ bool copies() const { return warp == 0 && elect_one(); }
  // The named barrier of its own threads.
  __device__ __forceinline__ int barrier() const { return PingPong::kOwnBarrier + number; }
  // The byte where a slab of its own begins, 0 or 1.
  __device__ __forceinline__ int slab(int i) const {
    return PingPong::kOut + (2 * number + i) * PingPong::kSlabBytes;
  }
  // Where a lane's row of the fragment of the warp's upper 16 rows, and of a slab's first 16
  // columns, lies. Other columns, 16 n further on, are at ^ 2 n, the lower rows at + kHalfChunks.
  static constexpr int kHalfChunks = PingPong::kHalfBytes / 16;
  __device__ __forceinline__ int place() const {
    const int row = 16 * warp + lane() % 16;
    return row * (PingPong::kRowBytes / 16) + (lane() / 16 ^ lane() % 8);
  }
};

// The producer's work, of one thread.
template<Major kRight>
__device__ __forceinline__ void load_ping_pong(const PingPongProduct& p, Mbarriers barriers) {
  using Is = PingPong;
  PingPongPlace at(0);
#pragma unroll 1
  for (int number = int(blockIdx.x); number < p.row_tiles * p.col_tiles; number += int(gridDim.x)) {
    const PingPongTile tile(p, number);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, at.advance()) {
      const auto box = [&](int i) {
        return shared_memory<uint4>(at.stage * Is::kStageBytes + i * Is::kHalfBytes);
      };
      const int full = Is::kFull + at.stage, inner = step * Is::kDepth;
      mbarrier_wait(barriers, Is::kEmpty + at.stage, at.parity ^ 1);
      mbarrier_arrive_expecting(barriers, full, Is::kStageBytes);
      tma_load(box(0), p.left, inner, tile.row, 0, barriers, full);
      if constexpr (kRight == Major::kInner) {
        tma_load(box(2), p.right, inner, tile.col, 0, barriers, full);
      } else {
        tma_load(box(2), p.right, tile.col, inner, 0, barriers, full);
        tma_load(box(3), p.right, tile.col + Is::kDepth, inner, 0, barriers, full);
      }
    }
  }
}

// A consumer's sums of one tile. `step`: how many steps the block has made before. Its last
// products are still under way then; returns the stage that they read.
template<class T, Major kRight>
__device__ __forceinline__ int multiply_ping_pong(PingPong::Sums& sums, int steps, unsigned step,
                                                  Mbarriers barriers) {
  using Is = PingPong;
  constexpr Major kInner = Major::kInner;
  PingPongPlace at(step);
  int used = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i, at.advance()) {
    mbarrier_wait(barriers, Is::kFull + at.stage, at.parity);
    const Shared<uint4> stage = shared_memory<uint4>(at.stage * Is::kStageBytes);
    wgmma_fence();
    const uint64_t left = wgmma_matrix<Is::kRowBytes>(stage, 0);
    const uint64_t right = wgmma_matrix<Is::kRowBytes>(stage, Is::kSlabBytes, Is::kHalfBytes);
#pragma unroll
    for (int k = 0; k < Is::kDepth / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wgmma<T, kInner, kRight>(
            sums[half],
            wgmma_further(left, half * Is::kHalfBytes + k * kWgmmaStep<Is::kRowBytes, kInner>),
            wgmma_further(right, k * kWgmmaStep<Is::kRowBytes, kRight>), i > 0 || k > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && elect_one()) mbarrier_arrive(barriers, Is::kEmpty + used);
    used = at.stage;
  }
  return used;
}

// All of a kernel but what it does with the sums:
//   use.begin(consumer, tile, i)          before the i-th product of this consumer
//   use.meanwhile(consumer, tile)         while its last products are under way
//   use.finish(consumer, tile, i, sums)
//   use.end(consumer)                     behind the last tile
template<class T, Major kRight, class Use>
__device__ __forceinline__ void ping_pong(const PingPongProduct& p, Use& use) {
  using Is = PingPong;
  const Mbarriers barriers = shared_memory<uint64_t>(Is::kBarriers);
  if (threadIdx.x == 0) {
    tma_prefetch(p.left);
    tma_prefetch(p.right);
    for (int i = 0; i < Is::kStages; ++i) {
      mbarrier_init(barriers, Is::kFull + i, 1);
      mbarrier_init(barriers, Is::kEmpty + i, kWarpgroup / 32);  // a lane of each warp arrives
    }
    for (int i = 0; i < 2; ++i) mbarrier_init(barriers, Is::kOwn + i, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  await_earlier_kernels();
  if (threadIdx.x < kWarpgroup) {
    set_registers<Is::kAtLaunch, Is::kOfProducer>();
    if (threadIdx.x < 32 && elect_one()) load_ping_pong<kRight>(p, barriers);
    return;
  }
  set_registers<Is::kAtLaunch, Is::kOfConsumer>();
  const PingPongConsumer me;
  const int tiles = p.row_tiles * p.col_tiles, blocks = int(gridDim.x);
  int number = int(blockIdx.x) + me.number * blocks;
  PingPong::Sums sums;  // a tile's first product doesn't add to them
#pragma unroll 1
  for (int i = 0; number < tiles; ++i, number += 2 * blocks) {
    const PingPongTile tile(p, number);
    use.begin(me, tile, i);
    // The other consumer gives the turn, but for the block's first tile. It also tells all threads
    // of this one what each of them did with its last tile.
    if (i > 0 || me.number > 0) named_barrier_sync(Is::kTurnBarrier + me.number, 2 * kWarpgroup);
    const unsigned step = unsigned(2 * i + me.number) * unsigned(p.steps);
    const int used = multiply_ping_pong<T, kRight>(sums, p.steps, step, barriers);
    if (number + blocks < tiles) {
      named_barrier_arrive(Is::kTurnBarrier + 1 - me.number, 2 * kWarpgroup);
    }
    use.meanwhile(me, tile);
    wgmma_wait<0>();
    if (elect_one()) mbarrier_arrive(barriers, Is::kEmpty + used);
    use.finish(me, tile, i, sums);
  }
  use.end(me);
}

}  // namespace bertfast
