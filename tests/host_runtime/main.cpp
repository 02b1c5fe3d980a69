// host_runtime ORDER SEED CASE [ARGUMENT...]: runs one case under one schedule.
//
// A case prints its results. A fault goes to stderr, and the exit status is 1.
#include <cstdio>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>

#include "cases.h"
#include "host/control.h"

namespace bertfast {
namespace host_runtime_test {
namespace {

std::map<std::string, void (*)(const Arguments&)>& cases() {
  static std::map<std::string, void (*)(const Arguments&)> all;
  return all;
}

}  // namespace

Case::Case(const char* name, void (*run)(const Arguments&)) {
  cases()[name] = run;
}

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

int run(int argc, char** argv) {
  if (argc < 4 || !cases().count(argv[3])) {
    std::fprintf(stderr, "usage: host_runtime ORDER SEED CASE [ARGUMENT...]\n");
    return 2;
  }
  try {
    host::set_schedule(argv[1], std::stoull(argv[2]));
    cases()[argv[3]](Arguments(argv + 4, argv + argc));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace host_runtime_test
}  // namespace bertfast

int main(int argc, char** argv) {
  return bertfast::host_runtime_test::run(argc, argv);
}
