// mbarriers: how often threads have arrived, and how many bytes copies have brought.
//
// The objects live here, by their place in shared memory, where nobody else may touch their 8
// bytes. A wait takes what the arrivals of the ended phases knew (clocks.h), and what copies
// brought: so whoever reads without having waited, or waited for another phase, is found by the
// race check.
#pragma once

#include <string>

#include "host/clocks.h"
#include "host/site.h"

namespace bertfast {
namespace host {
namespace mbarrier {

void begin_block();
void end_block();

void init(int byte, int arrivals, Site site);
void init_fence(Site site);
void arrive(int byte, int expected_bytes, Site site);
void wait(int byte, int parity, Site site);

// The number of the barrier at which a copy's bytes are to arrive, and the engine that brings them.
int of_copy(int byte, Site site);
int engine(int number);
// `bytes` of a copy have come, which was started with this knowledge.
void bytes_came(int number, int bytes, const clocks::Knowledge& with);

// Throws if these bytes are a barrier's.
void check_apart(int byte, int size, const char* access, Site site);

// Barriers in the middle of a phase, a line each, for a deadlock's message.
std::string open_phases();

}  // namespace mbarrier
}  // namespace host
}  // namespace bertfast
