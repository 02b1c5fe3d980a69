// All of Hopper's instructions in one kernel: a product by two warpgroups, fed by a third.
//
// out = a b^T, with 128 x K values of a, 64 x K of b and 128 x 64 of out, bfloat16. A stage has 32
// inner indices of both, and there are two. The first warpgroup is the producer: one of its threads
// starts the copies. Each of the others has 64 rows. On the CPU the kernel can be given a fault; on
// a GPU there is none.
#include "device/math.cuh"
#include "device/tma.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "hopper_units.h"

namespace bertfast {
namespace hopper_units {
namespace {

enum Fault {
  kNone,
  kSkippedWait,
  kOnlyOneWaits,
  kWrongParity,
  kUnreleasedStage,
  kReleasedBeforeTheWait,
  kNeverReleased,
  kTooFewBytes,
  kTooManyBytes,
  kTooManyArrivals,
  kNoInit,
  kNoInitFence,
  kNoBarrierAfterInit,
  kWriteOverABarrier,
  kMisalignedMap,
  kMisalignedBox,
  kTwoLoadsToOnePlace,
  kReadOfALoadUnderWay,
  kLoadNotWaitedFor,
  kBytesThatNeverCome,
  kOrdinaryReadBeforeALoad,
  kOrdinaryWriteBeforeAProduct,
  kNoWgmmaFence,
  kPartOfAWarpgroup,
  kOneThreadReturns,
  kOtherMatrices,
  kNoWgmmaWait,
  kNoWgmmaCommit,
  kSumsWritten,
  kMisalignedMatrix,
  kMatrixAcrossRows,
  kMatrixOutside,
  kWriteWhereWgmmaReads,
  kNoProxyFence,
  kNoNamedBarrier,
  kNamedBarrierOfOthers,
  kNamedBarrierTooLarge,
  kNamedBarrierTwice,
  kNamedBarrierLeftOpen,
  kStoreNotWaitedFor,
  kWriteWhereAStoreReads,
  kMoreRegistersThanThereAre,
  kTooManyRegisters,
  kRegistersTheOtherWay,
};

struct Params {
  TensorMap a, b, out;
  int turns;
#ifdef BERTFAST_HOST
  int fault;
  __device__ bool has(Fault which) const { return fault == which; }
#else
  __device__ bool has(Fault) const { return false; }
#endif
};

constexpr int kRowBytes = 64, kInner = kRowBytes / 2, kStages = 2;
constexpr int kA = 64 * kRowBytes, kB = 64 * kRowBytes;  // a warpgroup's part of a; b
constexpr int kStage = 2 * kA + kB;
constexpr int kOut = kStages * kStage;  // 2 x 64 rows of 128 bytes
constexpr int kBarriers = kOut + 128 * 128;
constexpr int kSharedBytes = kBarriers + 64;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kAtLaunch = 168, kOfProducer = 40, kOfConsumers = 232;

// For a fault.
__device__ __forceinline__ const TensorMap& misaligned(const TensorMap& map) {
  return *reinterpret_cast<const TensorMap*>(reinterpret_cast<const char*>(&map) + 16);
}

__device__ __forceinline__ void produce(const Params& p, Mbarriers full, Mbarriers empty) {
  for (int turn = 0; turn < p.turns; ++turn) {
    const int stage = turn % kStages, pass = turn / kStages;
    if (!p.has(kUnreleasedStage)) mbarrier_wait(empty, stage, (pass + 1) & 1);  // empty: wait
    int bytes = kStage;
    if (p.has(kTooFewBytes)) bytes -= 16;
    if (p.has(kTooManyBytes)) bytes += 16;
    mbarrier_arrive_expecting(full, stage, bytes);  // full: arrive
    int at = stage * kStage;
    if (p.has(kMisalignedBox)) at += 128;
    const Shared<uint4> box = shared_memory<uint4>(at);
    if (p.has(kMisalignedMap)) tma_load(box, misaligned(p.a), 0, 0, 0, full, stage);  // bad map
    tma_load(box, p.a, turn * kInner, 0, 0, full, stage);                             // load of a
    if (p.has(kTwoLoadsToOnePlace)) at -= 2 * kA;
    const Shared<uint4> box_of_b = shared_memory<uint4>(at + 2 * kA);
    tma_load(box_of_b, p.b, turn * kInner, 0, 0, full, stage);  // load of b
  }
  if (p.has(kLoadNotWaitedFor) || p.has(kBytesThatNeverCome)) {
    const int stage = p.turns % kStages;
    mbarrier_wait(empty, stage, (p.turns / kStages + 1) & 1);
    if (p.has(kBytesThatNeverCome)) {
      mbarrier_arrive_expecting(full, stage, kStage);  // never come
    } else {
      tma_load(shared_memory<uint4>(stage * kStage), p.a, 0, 0, 0, full, stage);  // one too many
    }
  }
}

__device__ __forceinline__ void consume(const Params& p, Mbarriers full, Mbarriers empty,
                                        int group) {
  const int thread = int(threadIdx.x) % kWarpgroup;
  float sums[8][4] = {};
  for (int turn = 0; turn < p.turns; ++turn) {
    const int stage = turn % kStages, pass = turn / kStages;
    int parity = pass & 1;
    if (p.has(kWrongParity)) parity ^= 1;
    const bool waits = !p.has(kSkippedWait) && (!p.has(kOnlyOneWaits) || thread == 0);
    if (waits) mbarrier_wait(full, stage, parity);  // full: wait
    const Shared<uint4> tile = shared_memory<uint4>(stage * kStage);
    if (p.has(kOrdinaryReadBeforeALoad)) tile.load(thread);  // ordinary read
    if (p.has(kOrdinaryWriteBeforeAProduct)) {
      tile.store(group * kA / 16 + thread, make_uint4(0, 0, 0, 0));  // write before a product
      named_barrier_sync(1 + group, kWarpgroup);
    }
    if (p.has(kOneThreadReturns) && thread == 5) return;
    const bool fences = !p.has(kNoWgmmaFence) && (!p.has(kPartOfAWarpgroup) || thread < 64);
    if (fences) wgmma_fence();  // wgmma_fence
    int a = group * kA, b = 2 * kA;
    if (p.has(kOtherMatrices) && thread >= 64) b = 0;
    if (p.has(kMisalignedMatrix)) b += 64;
    if (p.has(kMatrixAcrossRows)) b += 48;
    if (p.has(kMatrixOutside)) b = 227 * 1024 / 512 * 512;
#pragma unroll
    for (int step = 0; step < kInner / 16; ++step) {
      constexpr int kStep = kWgmmaStep<kRowBytes, Major::kInner>;
      wgmma<__nv_bfloat16, Major::kInner, Major::kInner>(  // product
          sums, wgmma_matrix<kRowBytes>(tile, a + step * kStep),
          wgmma_matrix<kRowBytes>(tile, b + step * kStep), true);
    }
    if (p.has(kSumsWritten)) sums[3][2] *= 2.f;
    if (p.has(kReleasedBeforeTheWait)) mbarrier_arrive(empty, stage);
    if (p.has(kWriteWhereWgmmaReads)) {
      tile.store(group * kA / 16 + thread, make_uint4(0, 0, 0, 0));  // ordinary write
    }
    if (!p.has(kNoWgmmaCommit)) wgmma_commit();
    if (!p.has(kNoWgmmaWait)) wgmma_wait<0>();
    if (p.has(kNeverReleased) && group == 1) continue;
    if (!p.has(kReleasedBeforeTheWait)) mbarrier_arrive(empty, stage);  // empty: arrive
    if (p.has(kTooManyArrivals)) mbarrier_arrive(empty, stage);         // too many
  }

  // Out by a bulk store, from where the warpgroup has put it together.
  const Shared<unsigned> pairs = shared_memory<unsigned>(kOut + group * 64 * 128);
  const int g = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread / 32 * 16 + g + 8 * half;
      pairs.store(32 * row + 4 * (n ^ (row & 7)) + t,  // write of out
                  pack<__nv_bfloat16>(sums[n][2 * half], sums[n][2 * half + 1]));
    }
  }
  if (!p.has(kNoProxyFence)) async_proxy_fence();
  int barrier = 1 + group, threads = kWarpgroup;
  if (p.has(kNamedBarrierOfOthers) && group == 1) barrier = 1, threads += 32;
  if (p.has(kNamedBarrierTooLarge)) threads += 32;
  if (p.has(kNamedBarrierTwice)) named_barrier_arrive(barrier, threads);
  if (!p.has(kNoNamedBarrier)) named_barrier_sync(barrier, threads);    // named barrier
  if (p.has(kNamedBarrierLeftOpen)) named_barrier_arrive(5, kThreads);  // left open
  if (thread / 32 == 0 && elect_one()) {
    tma_store(p.out, 0, 64 * group, 0, shared_memory<uint4>(kOut + group * 64 * 128));  // store
    tma_store_commit();
    if (!p.has(kStoreNotWaitedFor)) tma_store_wait_read<0>();
  }
  if (p.has(kWriteWhereAStoreReads)) pairs.store(thread, 0);  // overwrites out
}

__global__ void __launch_bounds__(kThreads, 1) pipeline(const __grid_constant__ Params p) {
  const Mbarriers full = shared_memory<uint64_t>(kBarriers);
  const Mbarriers empty = shared_memory<uint64_t>(kBarriers + 8 * kStages);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full, stage, 1);  // init of full
      if (p.has(kNoInit)) continue;
      mbarrier_init(empty, stage, 2 * kWarpgroup);  // init of empty
    }
    if (!p.has(kNoInitFence)) mbarrier_init_fence();
    if (p.has(kWriteOverABarrier)) shared_memory<int>(kBarriers).store(1, 0);  // over a barrier
  }
  if (!p.has(kNoBarrierAfterInit)) __syncthreads();
  const int group = int(threadIdx.x) / kWarpgroup;
  if (group == 0) {
    if (p.has(kMoreRegistersThanThereAre)) {
      set_registers<176, kOfProducer>();  // more than there are
    }
    set_registers<kAtLaunch, kOfProducer>();
    if (threadIdx.x / 32 == 0 && elect_one()) produce(p, full, empty);
  } else if (p.has(kTooManyRegisters)) {
    set_registers<kAtLaunch, kOfConsumers + 8>();  // too many registers
  } else {
    set_registers<kAtLaunch, kOfConsumers>();
    if (p.has(kReadOfALoadUnderWay)) shared_memory<int>(0).load(0);  // read of a load
    consume(p, full, empty, group - 1);
    if (p.has(kRegistersTheOtherWay)) set_registers<kAtLaunch, kAtLaunch + 8>();  // the other way
  }
}

}  // namespace

// TURNS and, on the CPU, FAULT; in: a, then b.
cudaError_t run_pipeline(const Numbers& numbers, const void* in, void* out) {
  Params p{};
  p.turns = numbers.at(0);
  const int inner = p.turns * kInner;
  const auto map = [&](TensorMap* to, const void* data, int rows, int columns, int box) {
    return make_tensor_map(to, {data,
                                {columns, rows, 1},
                                {columns, int64_t(columns) * rows},
                                {box, box == 64 ? 64 : rows, 1}});
  };
  cudaError_t error = map(&p.a, in, 128, inner, kInner);
  if (error == cudaSuccess) {
    error = map(&p.b, static_cast<const char*>(in) + 2 * 128 * inner, 64, inner, kInner);
  }
  if (error == cudaSuccess) error = map(&p.out, out, 128, 64, 64);
  if (error != cudaSuccess) return error;
#ifdef BERTFAST_HOST
  p.fault = numbers.at(1);
#endif
  return launch(pipeline, 1, kThreads, kSharedBytes, nullptr, p);
}

}  // namespace hopper_units
}  // namespace bertfast
