// Blocks of two tensors of heads, keys and values or queries and dout, which bulk copies bring to a
// ring of stages in shared memory, for one or more warpgroups that multiply by wgmma.
//
// Block b lies in stage b % kStages. The stage is filled again once all warpgroups have said that
// they are done with it. One thread starts the copies, a block late: what it waits for is then
// mostly over.
//
// A box goes on behind a sequence's end, where others' rows lie. Those that a product would sum
// over are made zeros before it (zero_rows), lest a NaN there gets into the sums.
#pragma once

#include "device/attention/head_boxes.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"

namespace bertfast {

template<int kDim>
struct BlockStream {
  static constexpr int kRows = kTileRows;
  static constexpr int kStages = 4;
  static constexpr int kBlockBytes = HeadBoxes<kDim>::kBytes;
  static constexpr int kStageBytes = 2 * kBlockBytes;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBarrierBytes = 2 * kStages * 8;

  int ring, barriers;  // bytes of shared memory where they begin

  __device__ __forceinline__ Mbarriers full() const { return shared_memory<uint64_t>(barriers); }
  __device__ __forceinline__ Mbarriers empty() const {
    return shared_memory<uint64_t>(barriers + 8 * kStages);
  }
  static __device__ __forceinline__ int stage(int block) { return int(unsigned(block) % kStages); }
  static __device__ __forceinline__ int phase(int block) {
    return int(unsigned(block) / kStages & 1);
  }
  // Where a block's part lies, in bytes.
  __device__ __forceinline__ int place(int block, int part) const {
    return ring + stage(block) * kStageBytes + part * kBlockBytes;
  }

  // One thread makes the barriers. Others know of them after a __syncthreads. releases: how many
  // threads release a block.
  __device__ __forceinline__ void init(int releases) const {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full(), i, 1);
      mbarrier_init(empty(), i, releases);
    }
    mbarrier_init_fence();
  }

  // One thread starts the copies of a block; rows: where block 0 begins in each tensor's map.
  __device__ __forceinline__ void load(const HeadBoxes<kDim>& first, const HeadBoxes<kDim>& second,
                                       int head, const int (&rows)[2], int block) const {
    const int i = stage(block), further = block * kRows;
    mbarrier_arrive_expecting(full(), i, kStageBytes);
    first.load(place(block, 0), rows[0] + further, head, full(), i);
    second.load(place(block, 1), rows[1] + further, head, full(), i);
  }

  // Waits for a block's copies. again: how many streams of one block came before.
  __device__ __forceinline__ void wait(int block, int again = 0) const {
    mbarrier_wait(full(), stage(block), phase(block) ^ (again & 1));
  }

  // A block's part as wgmma reads it: one of its slabs, or with Major::kOuter all of them.
  template<class S = Slab<0, HeadBoxes<kDim>::kColumns>>
  __device__ __forceinline__ uint64_t matrix(int block, int part, S = {}) const {
    const Shared<uint4> first = shared_memory<uint4>(ring + part * kBlockBytes + S::kByte);
    const uint64_t matrix = wgmma_matrix<S::Rows::kRowBytes>(first, 0, HeadBoxes<kDim>::kSlabBytes);
    return wgmma_further(matrix, stage(block) * kStageBytes);
  }

  // Says that those whom this thread speaks for are done with a block.
  __device__ __forceinline__ void release(int block) const {
    mbarrier_arrive(empty(), stage(block));
  }

  // Waits until all are done with a block.
  __device__ __forceinline__ void wait_released(int block) const {
    mbarrier_wait(empty(), stage(block), phase(block));
  }

  // Makes zeros of those rows of a block, which has come, whose bits are 0. All `threads` of the
  // warpgroups that read it call this; wgmma needs an async_proxy_fence and a barrier after it.
  __device__ __forceinline__ void zero_rows(int block, int part, const unsigned (&bits)[2],
                                            int thread, int threads) const {
    for_each_slab<kDim>([&](auto slab) {
      using S = decltype(slab);
      using Rows = typename S::Rows;
      const Shared<uint4> tile = shared_memory<uint4>(place(block, part) + S::kByte);
#pragma unroll 1
      for (int i = thread; i < kRows * Rows::kChunks; i += threads) {
        const int row = i / Rows::kChunks;
        if ((row < 32 ? bits[0] : bits[1]) >> (row & 31) & 1) continue;
        tile.store(Rows::place(row, i % Rows::kChunks), make_uint4(0, 0, 0, 0));
      }
    });
  }
};

}  // namespace bertfast
