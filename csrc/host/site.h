// The source line that made a call, so that an error can name it.
#pragma once

#include <string>

namespace bertfast {
namespace host {

// As the default value of a function's last parameter, Site::here() is the caller's own line.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

inline std::string to_string(Site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

}  // namespace host
}  // namespace bertfast
