// Finds two threads that touch the same byte of shared memory, at least one writing, with nothing
// between the two accesses that orders them.
//
// It doesn't wait for a race to go wrong: it compares each access with the last ones to the same
// bytes, so it also sees races that this run's order of threads has hidden.
#pragma once

#include "host/site.h"

namespace bertfast {
namespace host {
namespace race_check {

// Forgets all accesses; the block has `shared_bytes` of shared memory.
void begin_block(int shared_bytes);

// All threads of the block, or all lanes of one warp, have met: accesses before come before those
// after.
void order_block();
void order_warp(int warp);

// An access by the running thread, aligned to its size, which is 1, 2 or a multiple of 4. Throws if
// it races with an earlier one.
void access(int byte, int size, bool writes, Site site);

}  // namespace race_check
}  // namespace host
}  // namespace bertfast
