// How a file adds its functions to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace bertfast {

// Each file of an op has one of these, outside all functions: `add` runs when the module is
// imported.
class Binding {
 public:
  explicit Binding(void (*add)(pybind11::module_&));
};

}  // namespace bertfast
