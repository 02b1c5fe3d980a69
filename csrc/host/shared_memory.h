// The block's dynamic shared memory, in which every access is checked and recorded.
#pragma once

#include <cstring>
#include <type_traits>

#include "host/site.h"

namespace bertfast {
namespace host {
namespace shared_memory {

// What a thread block may ask for on sm_90 and sm_100, where it is most. gpu.h: what it may here.
constexpr int kMaxBytes = 227 * 1024;

// Fills `bytes` with 0xff: NaN as float, half and bfloat16, -1 as int.
void begin_block(int bytes);
void end_block();
// The block failed: its last accesses aren't counted.
void abandon_block();

// Checks and records that the running thread accesses element `index` of those of `size` bytes that
// start at byte `start`; returns where it is. Throws on an access out of bounds and on a race.
void* access(int start, int index, int size, bool writes, Site site);

// The same for the parts of an access that count apart. A cp.async is checked when it is issued,
// and lands later, as its thread's write. A matrix row is one access to the banks, by the lane that
// gives its address, and is read or written by other lanes, a word each.
int begin_copy(int start, int index, int size, Site site);  // the byte where it goes
int matrix_row(int start, int index, bool writes, Site site);
void* write_landed(int byte, int size, Site site);
void read_word(int byte, Site site);

// All of it, for engines: their accesses are checked where they are made.
unsigned char* raw();

// Throws unless there are `size` bytes from `byte` on.
void check_range(int byte, int size, const char* access, Site site);

// Throws unless a view of elements with this alignment may start at byte `start`.
void check_alignment(int start, int alignment, Site site);

}  // namespace shared_memory
}  // namespace host

// See device/cuda.cuh. The last parameter, never written in a kernel, is the line of the access.
template<class T>
struct Shared {
  static_assert(std::is_trivially_copyable<T>::value, "shared memory holds plain values");
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 ||
                    sizeof(T) == 16,
                "one instruction accesses 1, 2, 4, 8 or 16 bytes");
  int byte_offset;

  T load(int i, host::Site site = host::Site::here()) const {
    T value;
    std::memcpy(&value, host::shared_memory::access(byte_offset, i, sizeof(T), false, site),
                sizeof(T));
    return value;
  }
  void store(int i, T value, host::Site site = host::Site::here()) const {
    std::memcpy(host::shared_memory::access(byte_offset, i, sizeof(T), true, site), &value,
                sizeof(T));
  }
};

template<class T>
Shared<T> shared_memory(int byte_offset, host::Site site = host::Site::here()) {
  host::shared_memory::check_alignment(byte_offset, sizeof(T), site);
  return {byte_offset};
}

}  // namespace bertfast
