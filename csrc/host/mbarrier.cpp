#include "host/mbarrier.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "host/left_out.h"
#include "host/proxy.h"
#include "host/scheduler.h"
#include "host/shared_memory.h"

namespace bertfast {
namespace host {
namespace mbarrier {
namespace {

constexpr int kMost = (1 << 20) - 1;  // arrivals, and bytes, of a phase

struct Barrier {
  int byte;
  int arrivals;
  Site site;  // of its init
  int maker;  // the thread, and when
  uint64_t made;
  bool fenced;  // by its maker, since
  int engine;
  int phase;
  int missing;  // arrivals
  int bytes;    // expected, less those that came
  Site expected_at;
  clocks::Knowledge gathering;  // in this phase and before
  clocks::Knowledge known;      // at the end of the last phase
  std::vector<int> waiting;
};

std::vector<Barrier> barriers;

std::string name(const Barrier& barrier) {
  return "mbarrier at byte " + std::to_string(barrier.byte) + " (" + to_string(barrier.site) + ")";
}

[[noreturn]] void fail(const std::string& message, Site site) {
  throw std::runtime_error(message + " at " + to_string(site) + ", in " +
                           thread_name(current_thread()));
}

Barrier& find(int byte, Site site) {
  for (Barrier& barrier : barriers) {
    if (barrier.byte != byte) continue;
    if (barrier.made >= clocks::known_until(current_thread(), barrier.maker)) {
      fail("use of an " + name(barrier) + ", with no barrier after its mbarrier_init", site);
    }
    return barrier;
  }
  fail("byte " + std::to_string(byte) + " is no mbarrier: no mbarrier_init has made it", site);
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  clocks::learn(&barrier.gathering, barrier.engine, clocks::tick());
  barrier.known = barrier.gathering;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
  for (int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

std::string what_is_missing(const Barrier& barrier) {
  std::string text = name(barrier) + ", phase " + std::to_string(barrier.phase) + ": " +
                     std::to_string(barrier.arrivals - barrier.missing) + " of " +
                     std::to_string(barrier.arrivals) + " arrivals";
  if (barrier.bytes > 0) {
    text += ", " + std::to_string(barrier.bytes) + " bytes less came than were expected, last at " +
            to_string(barrier.expected_at);
  }
  if (barrier.bytes < 0) {
    text += ", " + std::to_string(-barrier.bytes) + " bytes more came than were expected";
  }
  return text;
}

}  // namespace

void begin_block() {
  barriers.clear();
}

void end_block() {
  for (const Barrier& barrier : barriers) {
    if (barrier.bytes == 0) continue;
    const std::string text = what_is_missing(barrier);
    barriers.clear();
    throw std::runtime_error(block_name() + " ended with an open " + text);
  }
}

void init(int byte, int arrivals, Site site) {
  shared_memory::check_range(byte, 8, "mbarrier_init", site);
  if (arrivals < 1 || arrivals > kMost) {
    fail("mbarrier_init for " + std::to_string(arrivals) + " arrivals", site);
  }
  check_apart(byte, 8, "mbarrier_init", site);
  clocks::use_table();
  Barrier barrier{};
  barrier.byte = byte;
  barrier.arrivals = barrier.missing = arrivals;
  barrier.site = site;
  barrier.maker = current_thread();
  barrier.made = clocks::tick();
  barrier.engine = clocks::new_engine("a copy for the " + name(barrier),
                                      "mbarrier_wait tells a thread, and for that phase");
  barriers.push_back(barrier);
}

void init_fence(Site site) {
  if (is_left_out(site)) return;
  for (Barrier& barrier : barriers) barrier.fenced |= barrier.maker == current_thread();
}

void arrive(int byte, int expected_bytes, Site site) {
  if (is_left_out(site)) return;
  Barrier& barrier = find(byte, site);
  if (barrier.missing == 0) {
    fail("one arrival too many at the " + name(barrier) + ", which waits for bytes only,", site);
  }
  clocks::release(&barrier.gathering);
  --barrier.missing;
  if (expected_bytes > 0) {
    barrier.bytes += expected_bytes;
    barrier.expected_at = site;
  }
  if (barrier.bytes > kMost) fail("more bytes expected than an mbarrier can count", site);
  end_phase_if_complete(barrier);
}

void wait(int byte, int parity, Site site) {
  if (is_left_out(site)) return;
  const Barrier& found = find(byte, site);
  if (parity != 0 && parity != 1) fail("mbarrier_wait for parity " + std::to_string(parity), site);
  const size_t number = size_t(&found - barriers.data());
  while (barriers[number].phase % 2 == parity) {
    barriers[number].waiting.push_back(current_thread());
    suspend("mbarrier_wait", site);
  }
  clocks::acquire(current_thread(), barriers[number].known);
}

int of_copy(int byte, Site site) {
  const Barrier& barrier = find(byte, site);
  if (!barrier.fenced) {
    fail("copy to the " + name(barrier) + ", whose maker made no mbarrier_init_fence,", site);
  }
  return int(&barrier - barriers.data());
}

int engine(int number) {
  return barriers[size_t(number)].engine;
}

void bytes_came(int number, int bytes, const clocks::Knowledge& with) {
  Barrier& barrier = barriers[size_t(number)];
  clocks::merge(&barrier.gathering, with);
  barrier.bytes -= bytes;
  end_phase_if_complete(barrier);
}

void check_apart(int byte, int size, const char* access, Site site) {
  for (const Barrier& barrier : barriers) {
    if (byte >= barrier.byte + 8 || barrier.byte >= byte + size) continue;
    fail(std::string(access) + " over the " + name(barrier), site);
  }
}

std::string open_phases() {
  std::string text;
  for (const Barrier& barrier : barriers) {
    if (barrier.missing == barrier.arrivals && barrier.bytes == 0 && barrier.waiting.empty()) {
      continue;
    }
    text += "\n  " + what_is_missing(barrier);
  }
  return text;
}

}  // namespace mbarrier
}  // namespace host
}  // namespace bertfast
