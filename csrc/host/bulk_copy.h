// Bulk copies of boxes by engines of their own.
//
// A load's bytes land as late as they may: when no thread can go on without them, the first, the
// last or any of those under way, by the schedule's order. Until then any access to them is an
// error; then they are there for whoever has waited for the mbarrier's phase.
//
// A store takes its bytes when it is started, and keeps everybody from writing there until its
// thread's wait; the bytes are in global memory when the block ends at the latest, and in no case
// before a wait.
#pragma once

#include <array>

#include "host/site.h"

namespace bertfast {
namespace host {
namespace bulk_copy {

// Of 16-bit values; sizes and strides in bytes of a matrix of rows of them. A box has rows of 64 or
// 128 bytes, which are swizzled in shared memory.
struct alignas(64) TensorMap {
  const void* data;
  int sizes[3];
  long long strides[2];
  int box[3];
};

using Place = std::array<int, 3>;

// Throws if a copy is still under way.
void end_block();
void abandon_block();

void load(int to, const TensorMap& from, const Place& at, int barrier_byte, Site site);
void store(const TensorMap& to, const Place& at, int from, Site site);
void commit(Site site);
void wait_read(int left, Site site);

// Lands one load. False if none is under way.
bool land_one();

// Throws if a load to these bytes is under way.
void check_landed(int byte, int size, const char* access, Site site);

// Where the byte lies that a dense matrix with rows of 64 or 128 bytes would have at `byte`.
int swizzled(int byte, int row_bytes);

}  // namespace bulk_copy
}  // namespace host
}  // namespace bertfast
