#include "host/race_check.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/clocks.h"
#include "host/proxy.h"
#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace race_check {

struct Access {
  uint64_t time = 0;  // 0 is before every block
  Site site{};
  int agent = 0;
};

namespace {

// What is remembered of a word, or of one byte of it. Two readers are enough to judge any later
// write where only barriers of the block and of warps order accesses: see note_read.
struct Cell {
  Access write;
  Access read;
  Access other_read;
  std::vector<Access> more_reads;
};

// cells[0] holds one cell a word, as long as only whole words are accessed. A word's first smaller
// access splits it: from then on, in this block, cells[b] holds the cell of its byte b.
std::vector<Cell> cells[4];
std::vector<uint64_t> split_at;

bool ordered(const Access& earlier, int thread) {
  if (earlier.agent == thread) return true;
  const bool by_engine = earlier.agent >= clocks::kEngines;
  if (earlier.time < (by_engine ? clocks::block_start : clocks::block_ordered)) return true;
  return earlier.time < clocks::known_until(thread, earlier.agent);
}

std::string words(const Access& access, bool writes, bool earlier) {
  const char* verb = earlier ? (writes ? " wrote" : " read") : (writes ? " writes" : " reads");
  return clocks::name_of(access.agent) + verb + " it at " + to_string(access.site);
}

[[noreturn]] void report(const Access& earlier, bool wrote, const Access& access, bool writes,
                         int byte) {
  std::string text = "race on byte " + std::to_string(byte) +
                     " of shared memory: " + words(earlier, wrote, true) + ", " +
                     words(access, writes, false) + ", with ";
  if (earlier.agent >= clocks::kEngines) {
    throw std::runtime_error(text + "nothing that tells " + thread_name(current_thread()) +
                             " that it is over: " + clocks::hint_of(earlier.agent));
  }
  throw std::runtime_error(text + "no barrier between");
}

// A later write races with some reader since the last barrier if it races with one of the two kept
// in `read` and `other_read`. `read` is the latest. `other_read` is one of another warp, if there
// was one: then no thread is in the warp of both, and any write races. Else all readers are in one
// warp, and it is the latest by another thread than `read`: of the readers, those two came after
// the warp's last
// __syncwarp, if any did.
//
// With a table of clocks all readers are kept but those that come before a later one.
void note_read(Cell& cell, const Access& access) {
  if (clocks::has_table) {
    auto& reads = cell.more_reads;
    const auto covered = [&](const Access& earlier) {
      return earlier.agent == access.agent ||
             (access.agent < clocks::kEngines && ordered(earlier, access.agent));
    };
    reads.erase(std::remove_if(reads.begin(), reads.end(), covered), reads.end());
    reads.push_back(access);
    return;
  }
  if (cell.read.time >= clocks::block_ordered && cell.read.agent != access.agent) {
    bool other_is_of_another_warp = cell.other_read.time >= clocks::block_ordered &&
                                    cell.other_read.agent / warpSize != access.agent / warpSize;
    if (!other_is_of_another_warp) cell.other_read = cell.read;
  }
  cell.read = access;
}

template<class Use>
void for_each_read(const Cell& cell, Use use) {
  use(cell.read);
  use(cell.other_read);
  for (const Access& read : cell.more_reads) use(read);
}

void check(Cell& cell, const Access& access, bool writes, int byte) {
  if (!ordered(cell.write, access.agent)) report(cell.write, true, access, writes, byte);
  if (!writes) {
    note_read(cell, access);
    return;
  }
  for_each_read(cell, [&](const Access& read) {
    if (!ordered(read, access.agent)) report(read, false, access, true, byte);
  });
  cell.more_reads.clear();
  cell.write = access;
}

bool is_split(size_t word) {
  return split_at[word] >= clocks::block_start;
}

void split(size_t word) {
  for (int byte = 1; byte < 4; ++byte) {
    if (cells[byte].size() < split_at.size()) cells[byte].resize(split_at.size());
    cells[byte][word] = cells[0][word];
  }
  split_at[word] = clocks::now;
}

// Calls use(cell, byte) with the cells of whole words.
template<class Use>
void for_each_cell(int byte, int size, Use use) {
  for (int at = byte; at < byte + size; at += 4) {
    const size_t word = size_t(at / 4);
    const int count = is_split(word) ? 4 : 1;
    for (int b = 0; b < count; ++b) use(cells[b][word], at + b);
  }
}

}  // namespace

void begin_block(int shared_bytes) {
  size_t words = size_t(shared_bytes + 3) / 4;
  if (split_at.size() < words) {
    cells[0].resize(words);
    split_at.resize(words);
  }
}

void access(int byte, int size, bool writes, Site site) {
  Access access{clocks::now, site, current_thread()};
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

EngineAccess::EngineAccess(int engine, int first, int threads, Site site)
    : engine_(engine), first_(first), threads_(threads), site_(site) {}

// Of those who start the access, what the least knowing one knows.
uint64_t EngineAccess::known_until(int agent) {
  if (known_.size() <= size_t(agent)) known_.resize(size_t(agent) + 1);
  uint64_t& known = known_[size_t(agent)];
  if (known == 0) {
    known = clocks::known_until(first_, agent);
    for (int i = 1; i < threads_; ++i) {
      known = std::min(known, clocks::known_until(first_ + i, agent));
    }
  }
  return known;
}

void EngineAccess::check(const Access& earlier, bool wrote, bool writes, int byte) {
  if (earlier.time < clocks::block_start) return;
  const Access access{clocks::now, site_, engine_};
  const uint64_t until = known_until(earlier.agent);
  if (earlier.time >= until) report(earlier, wrote, access, writes, byte);
  if (earlier.agent >= clocks::kEngines) return;
  if (proxy::fenced(earlier.agent, earlier.time, until)) return;
  throw std::runtime_error(words(earlier, wrote, true) + ", byte " + std::to_string(byte) +
                           " of shared memory, and made no async_proxy_fence before " +
                           words(access, writes, false));
}

void EngineAccess::read(int byte, int size) {
  for_each_cell(byte, size, [&](Cell& cell, int at) {
    if (cell.write.time < clocks::block_start) {
      throw std::runtime_error(words({0, site_, engine_}, false, false) + ", byte " +
                               std::to_string(at) +
                               " of shared memory, where nobody has written yet");
    }
    check(cell.write, true, false, at);
    note_read(cell, {clocks::now, site_, engine_});
  });
}

void EngineAccess::will_write(int byte, int size) {
  for_each_cell(byte, size, [&](Cell& cell, int at) {
    check(cell.write, true, true, at);
    for_each_read(cell, [&](const Access& earlier) { check(earlier, false, true, at); });
  });
}

void engine_wrote(int engine, int byte, int size, Site site) {
  for_each_cell(byte, size, [&](Cell& cell, int) {
    cell.write = {clocks::now, site, engine};
    cell.read = cell.other_read = {};
    cell.more_reads.clear();
  });
}

}  // namespace race_check
}  // namespace host
}  // namespace bertfast
