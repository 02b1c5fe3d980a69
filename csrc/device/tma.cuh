// Bulk copies of boxes of a tensor, between global and shared memory, for compute capability 9.0
// on.
//
// One thread starts a copy (device/warpgroup.cuh: elect_one) and the hardware makes it. A box in
// shared memory is dense: rows of 64 or 128 bytes with the swizzle of Tile<32> or Tile<64>, from a
// multiple of 512 or 1024 bytes on.
//
// A load ends by its bytes' arrival at an mbarrier: whoever has waited for that phase may read
// them, by wgmma too. Before a load whatever was there must have been read, its readers must have
// said so to the thread that starts it, and ordinary accesses need their threads'
// async_proxy_fence.
//
// A store reads shared memory until its thread has waited for its group, and needs an
// async_proxy_fence after what it reads was written.
#pragma once

#include "device/mbarrier.cuh"
#include "device/proxy.cuh"
#include "device/tensor_map.cuh"

namespace bertfast {

#ifdef BERTFAST_HOST

inline void tma_prefetch(const TensorMap&) {}

inline void tma_load(Shared<uint4> to, const TensorMap& from, int x, int y, int z,
                     Mbarriers barriers, int i, host::Site site = host::Site::here()) {
  host::bulk_copy::load(to.byte_offset, from, {x, y, z}, barriers.byte_offset + 8 * i, site);
}

inline void tma_store(const TensorMap& to, int x, int y, int z, Shared<uint4> from,
                      host::Site site = host::Site::here()) {
  host::bulk_copy::store(to, {x, y, z}, from.byte_offset, site);
}

inline void tma_store_commit(host::Site site = host::Site::here()) {
  host::bulk_copy::commit(site);
}

template<int kLeft>
void tma_store_wait_read(host::Site site = host::Site::here()) {
  host::bulk_copy::wait_read(kLeft, site);
}

#else

// Has the map on its way before the first copy asks for it.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box that begins at (x, y, z), whose bytes arrive at barrier i.
__device__ __forceinline__ void tma_load(Shared<uint4> to, const TensorMap& from, int x, int y,
                                         int z, Mbarriers barriers, int i) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to.ptr)),
      "l"(&from), "r"(x), "r"(y), "r"(z), "r"(shared_address(barriers.ptr + i))
      : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap& to, int x, int y, int z,
                                          Shared<uint4> from) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], "
      "[%4];" ::"l"(&to),
      "r"(x), "r"(y), "r"(z), "r"(shared_address(from.ptr))
      : "memory");
}

// Closes a group of this thread's stores.
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's groups but the last kLeft have read shared memory: before it is written
// again, and before the block ends.
template<int kLeft>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace bertfast
