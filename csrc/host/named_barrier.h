// Barriers 1 to 15: of as many threads as they say, some of which may only arrive.
#pragma once

#include <string>

#include "host/site.h"

namespace bertfast {
namespace host {
namespace named_barrier {

void begin_block();
// Throws if threads have come to a barrier that the others never came to.
void end_block();

void sync(int barrier, int threads, Site site);
void arrive(int barrier, int threads, Site site);

// Barriers that threads have come to, a line each, for a deadlock's message.
std::string open();

}  // namespace named_barrier
}  // namespace host
}  // namespace bertfast
