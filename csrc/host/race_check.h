// Finds two accesses to the same byte of shared memory, at least one of them a write, with nothing
// between them that orders them.
//
// It doesn't wait for a race to go wrong: it compares each access with the last ones to the same
// bytes, so it also sees races that this run's order of threads has hidden. clocks.h says what
// orders accesses, and who makes them besides threads.
#pragma once

#include <cstdint>
#include <vector>

#include "host/site.h"

namespace bertfast {
namespace host {
namespace race_check {

struct Access;

// Forgets all accesses; the block has `shared_bytes` of shared memory.
void begin_block(int shared_bytes);

// An access by the running thread, aligned to its size, which is 1, 2 or a multiple of 4. Throws if
// it races with an earlier one.
void access(int byte, int size, bool writes, Site site);

// An access by an engine, of whole words. All threads from `first` on that start it must know what
// was done before, and ordinary accesses need their proxy fence.
class EngineAccess {
 public:
  EngineAccess(int engine, int first, int threads, Site site);
  void read(int byte, int size);
  // A write is there when it lands.
  void will_write(int byte, int size);

 private:
  uint64_t known_until(int agent);
  void check(const Access& earlier, bool wrote, bool writes, int byte);

  int engine_, first_, threads_;
  Site site_;
  std::vector<uint64_t> known_;  // by agent, as soon as it was asked for
};
void engine_wrote(int engine, int byte, int size, Site site);

}  // namespace race_check
}  // namespace host
}  // namespace bertfast
