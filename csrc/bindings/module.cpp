// The Python module: all that the other files here have to add to it.
#include "bindings/module.h"

#include <vector>

namespace bertfast {
namespace {

std::vector<void (*)(pybind11::module_&)>& bindings() {
  static std::vector<void (*)(pybind11::module_&)> all;
  return all;
}

}  // namespace

Binding::Binding(void (*add)(pybind11::module_&)) {
  bindings().push_back(add);
}

}  // namespace bertfast

PYBIND11_MODULE(BERTFAST_MODULE, m) {
  for (const auto add : bertfast::bindings()) add(m);
}
