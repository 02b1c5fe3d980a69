#include "host/race_check.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace race_check {
namespace {

struct Access {
  uint64_t time = 0;  // 0 is before every block
  Site site{};
  int thread = 0;
};

// What is remembered of a word, or of one byte of it. Two readers are enough to judge any later
// write: see note_read.
struct Cell {
  Access write;
  Access read;
  Access other_read;
};

// Time goes on whenever threads meet. An access before a meeting has a smaller time than its end.
uint64_t now = 0;
uint64_t block_start = 0;
uint64_t block_ordered = 0;
uint64_t warp_ordered[32];

// cells[0] holds one cell a word, as long as only whole words are accessed. A word's first smaller
// access splits it: from then on, in this block, cells[b] holds the cell of its byte b.
std::vector<Cell> cells[4];
std::vector<uint64_t> split_at;

bool unordered(const Access& earlier, int thread) {
  if (earlier.time < block_ordered || earlier.thread == thread) return false;
  int warp = thread / warpSize;
  return earlier.thread / warpSize != warp || earlier.time >= warp_ordered[warp];
}

[[noreturn]] void report(const Access& earlier, bool wrote, const Access& access, bool writes,
                         int byte) {
  throw std::runtime_error("race on byte " + std::to_string(byte) +
                           " of shared memory: " + thread_name(earlier.thread) +
                           (wrote ? " wrote" : " read") + " it at " + to_string(earlier.site) +
                           ", " + thread_name(access.thread) + (writes ? " writes" : " reads") +
                           " it at " + to_string(access.site) + ", with no barrier between");
}

// A later write races with some reader since the last barrier if it races with one of the two kept
// here. `read` is the latest. `other_read` is one of another warp, if there was one: then no thread
// is in the warp of both, and any write races. Else all readers are in one warp, and it is the
// latest by another thread than `read`: of the readers, those two came after the warp's last
// __syncwarp, if any did.
void note_read(Cell& cell, const Access& access) {
  if (cell.read.time >= block_ordered && cell.read.thread != access.thread) {
    bool other_is_of_another_warp = cell.other_read.time >= block_ordered &&
                                    cell.other_read.thread / warpSize != access.thread / warpSize;
    if (!other_is_of_another_warp) cell.other_read = cell.read;
  }
  cell.read = access;
}

void check(Cell& cell, const Access& access, bool writes, int byte) {
  if (unordered(cell.write, access.thread)) report(cell.write, true, access, writes, byte);
  if (!writes) {
    note_read(cell, access);
    return;
  }
  if (unordered(cell.read, access.thread)) report(cell.read, false, access, true, byte);
  if (unordered(cell.other_read, access.thread)) {
    report(cell.other_read, false, access, true, byte);
  }
  cell.write = access;
}

bool is_split(size_t word) {
  return split_at[word] >= block_start;
}

void split(size_t word) {
  for (int byte = 1; byte < 4; ++byte) {
    if (cells[byte].size() < split_at.size()) cells[byte].resize(split_at.size());
    cells[byte][word] = cells[0][word];
  }
  split_at[word] = now;
}

}  // namespace

void begin_block(int shared_bytes) {
  size_t words = size_t(shared_bytes + 3) / 4;
  if (split_at.size() < words) {
    cells[0].resize(words);
    split_at.resize(words);
  }
  order_block();
  block_start = block_ordered;
}

void order_block() {
  block_ordered = ++now;
}

void order_warp(int warp) {
  warp_ordered[warp] = ++now;
}

void access(int byte, int size, bool writes, Site site) {
  Access access{now, site, current_thread()};
  if (size < 4 && !is_split(size_t(byte / 4))) split(size_t(byte / 4));
  for (int offset = 0; offset < size; offset += 4) {
    size_t word = size_t((byte + offset) / 4);
    if (!is_split(word)) {
      check(cells[0][word], access, writes, byte + offset);
      continue;
    }
    int first = size < 4 ? byte % 4 : 0;
    int count = size < 4 ? size : 4;
    for (int b = first; b < first + count; ++b) {
      check(cells[b][word], access, writes, int(word) * 4 + b);
    }
  }
}

}  // namespace race_check
}  // namespace host
}  // namespace bertfast
