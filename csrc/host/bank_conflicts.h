// Counts how often the lanes of a warp get in each other's way in shared memory.
//
// Shared memory has 32 banks of 4-byte words. Lanes that touch different words of one bank in one
// instruction are served one after the other; the same word is served once. The fibers have no
// common instruction, so the lanes' k-th execution of one source line between two meetings of the
// warp counts as one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host/site.h"

namespace bertfast {
namespace host {

struct BankConflicts {
  std::string site;  // "file:line load" or "file:line store"
  int worst_degree;  // words that one bank had to serve for one access, at worst; 1 is free
  int64_t accesses;  // by whole warps
};

namespace banks {

// An access by the running thread.
void access(int byte, int size, bool writes, Site site);

// A warp, or the whole block, has met or ended: what was accessed since the last time is counted.
void close_warp(int warp);
void close_block();

// Drops what wasn't counted yet, of a block that failed.
void discard();

// What was counted since the last reset, in order of first appearance.
std::vector<BankConflicts> records();
void reset();

}  // namespace banks
}  // namespace host
}  // namespace bertfast
