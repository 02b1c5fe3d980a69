// __syncthreads, and the calls in which the lanes of a warp meet.
//
// Masks must be full, 0xffffffff: of a last warp with fewer than 32 lanes it means those there are.
// The last parameter, never written in a kernel, is the line of the call.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "host/left_out.h"
#include "host/scheduler.h"

namespace bertfast {
namespace host {

struct ShuffleLane {
  uint64_t value;
  int source;
  uint64_t result;
};
struct VoteLane {
  bool predicate;
  unsigned result;
};

// What each lane reads is decided in the lane; these run in the last one to arrive.
inline void compute_shuffle(void* const* lane_data, int lanes) {
  auto lane = [&](int i) { return static_cast<ShuffleLane*>(lane_data[i]); };
  for (int i = 0; i < lanes; ++i) lane(i)->result = lane(lane(i)->source)->value;
}
inline void compute_vote(void* const* lane_data, int lanes) {
  auto lane = [&](int i) { return static_cast<VoteLane*>(lane_data[i]); };
  unsigned votes = 0;
  for (int i = 0; i < lanes; ++i) votes |= unsigned(lane(i)->predicate) << i;
  for (int i = 0; i < lanes; ++i) lane(i)->result = votes;
}

inline void check_mask(const char* name, unsigned mask, Site site) {
  if (mask == 0xffffffffu) return;
  throw std::runtime_error(std::string(name) + " (" + to_string(site) +
                           ") has a partial mask; only 0xffffffff is supported");
}

inline int current_lane() {
  return current_thread() % warpSize;
}

// The lanes that the running thread's warp has.
inline int current_lanes() {
  int first = current_thread() - current_lane();
  int rest = int(blockDim.x * blockDim.y * blockDim.z) - first;
  return rest < warpSize ? rest : warpSize;
}

// Any lane may be elected, if it is the same each time.
inline bool elect_one(Site site) {
  warp_collective("elect_one", site, nullptr, nullptr);
  return current_lane() == (schedule.order == Order::kReverse ? current_lanes() - 1 : 0);
}

template<class T>
T shuffle(const char* name, unsigned mask, T value, int source, int width, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles move 4 or 8 bytes");
  check_mask(name, mask, site);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
    throw std::runtime_error(std::string(name) + " (" + to_string(site) + "): width " +
                             std::to_string(width) + " is no power of two up to 32");
  }
  if (source >= current_lanes()) {
    throw std::runtime_error(std::string(name) + " (" + to_string(site) +
                             "): " + thread_name(current_thread()) + " reads lane " +
                             std::to_string(source) + " of a warp with " +
                             std::to_string(current_lanes()) + " lanes");
  }
  ShuffleLane lane{0, source, 0};
  std::memcpy(&lane.value, &value, sizeof(T));
  warp_collective(name, site, &lane, &compute_shuffle);
  std::memcpy(&value, &lane.result, sizeof(T));
  return value;
}

inline unsigned vote(const char* name, unsigned mask, bool predicate, Site site) {
  check_mask(name, mask, site);
  VoteLane lane{predicate, 0};
  warp_collective(name, site, &lane, &compute_vote);
  return lane.result;
}

}  // namespace host
}  // namespace bertfast

inline void __syncthreads(bertfast::host::Site site = bertfast::host::Site::here()) {
  if (!bertfast::host::is_left_out(site)) bertfast::host::block_barrier("__syncthreads", site);
}

// Whether the predicate is true in any of the block's threads.
inline int __syncthreads_or(int predicate,
                            bertfast::host::Site site = bertfast::host::Site::here()) {
  return bertfast::host::block_barrier("__syncthreads_or", site, predicate != 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       bertfast::host::Site site = bertfast::host::Site::here()) {
  if (bertfast::host::is_left_out(site)) return;
  bertfast::host::check_mask("__syncwarp", mask, site);
  bertfast::host::warp_collective("__syncwarp", site, nullptr, nullptr, true);
}

// Shuffles work within segments of `width` lanes. A lane whose source lies beyond the segment gets
// its own value.
template<class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              bertfast::host::Site site = bertfast::host::Site::here()) {
  int first = bertfast::host::current_lane() & ~(width - 1);
  return bertfast::host::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)), width,
                                 site);
}

template<class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 bertfast::host::Site site = bertfast::host::Site::here()) {
  int lane = bertfast::host::current_lane();
  int source = lane - int(delta & 31u);
  if (source < (lane & ~(width - 1))) source = lane;
  return bertfast::host::shuffle("__shfl_up_sync", mask, value, source, width, site);
}

template<class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   bertfast::host::Site site = bertfast::host::Site::here()) {
  int lane = bertfast::host::current_lane();
  int source = lane + int(delta & 31u);
  if (source > (lane | (width - 1))) source = lane;
  return bertfast::host::shuffle("__shfl_down_sync", mask, value, source, width, site);
}

// Alone among them it also reaches back, into earlier segments.
template<class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  bertfast::host::Site site = bertfast::host::Site::here()) {
  int lane = bertfast::host::current_lane();
  int source = lane ^ (lane_mask & 31);
  if (source > (lane | (width - 1))) source = lane;
  return bertfast::host::shuffle("__shfl_xor_sync", mask, value, source, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              bertfast::host::Site site = bertfast::host::Site::here()) {
  return bertfast::host::vote("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate,
                      bertfast::host::Site site = bertfast::host::Site::here()) {
  return bertfast::host::vote("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      bertfast::host::Site site = bertfast::host::Site::here()) {
  return bertfast::host::vote("__all_sync", mask, predicate == 0, site) == 0;
}
