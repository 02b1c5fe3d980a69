#include "host/proxy.h"

#include <algorithm>
#include <vector>

#include "host/clocks.h"
#include "host/left_out.h"
#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace proxy {
namespace {

std::vector<std::vector<uint64_t>> fences;  // by thread: when, in order

}  // namespace

void begin_block() {
  fences.clear();
}

void fence(Site site) {
  if (is_left_out(site)) return;
  const size_t me = size_t(current_thread());
  if (fences.size() <= me) fences.resize(me + 1);
  fences[me].push_back(clocks::tick());
}

bool fenced(int thread, uint64_t access, uint64_t until) {
  if (size_t(thread) >= fences.size()) return false;
  const std::vector<uint64_t>& of = fences[size_t(thread)];
  const auto first = std::upper_bound(of.begin(), of.end(), access);
  return first != of.end() && *first < until;
}

}  // namespace proxy
}  // namespace host
}  // namespace bertfast
