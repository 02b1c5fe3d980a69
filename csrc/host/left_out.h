// A fault in a kernel as it is: the calls of one line are left out. So a test sees that the checks
// would find a wait, an arrival, a fence or a barrier that isn't there.
#pragma once

#include <string>

#include "host/site.h"

namespace bertfast {
namespace host {

struct LeftOut {
  std::string file;  // the end of its path
  int line = 0;      // 0: nothing is left out
};
inline LeftOut left_out;

inline bool is_left_out(Site site) {
  if (left_out.line != site.line) return false;
  const std::string path = site.file, &end = left_out.file;
  return path.size() >= end.size() && path.compare(path.size() - end.size(), end.size(), end) == 0;
}

}  // namespace host
}  // namespace bertfast
