// What every call has besides tensors: tuples that are read by position, numbers, and the launch.
#pragma once

#include <pybind11/pytypes.h>

#include "bindings/tensor.h"
#include "params.h"

namespace bertfast {

// The members of a Python tuple, a NamedTuple as a rule.
class Members {
 public:
  // TypeError where it isn't a tuple of that length.
  Members(py::handle tuple, Py_ssize_t count, const char* name);
  py::handle operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_.ptr(), i); }

 private:
  py::handle tuple_;
};

int64_t integer(py::handle object);
double number(py::handle object);
// ValueError where it isn't in range.
int at_least_one(int64_t value, const char* name);

// bertfast.ops.dropout.Dropout, for kernels that number rows or scores. All is empty without
// dropout.
struct Dropout {
  const int64_t* seed = nullptr;
  const int64_t* rows = nullptr;  // the rows' numbers; null: 0, 1, 2, ...
  float keep_scale = 1.f;
  uint32_t threshold = 0;
  uint32_t site = 0;

  Dropout(Operands& operands, py::handle tuple, int64_t row_count);
};

// Throws what a launch returned, if that is an error.
void check(cudaError_t error, const char* what);

// How many groups of rows a block takes, one after the other, where `side_by_side` blocks fill a
// GPU: so many that these take all groups, in as few rounds as chains of `longest` allow. The rows
// alone decide, not the GPU: a block's rows are one partial sum, and so bits.
int64_t chain(int64_t groups, int64_t side_by_side, int64_t longest);

int bytes_of(DType dtype);

// ValueError where there is none of that number: bertfast/ops/gated/limits.py.
Activation activation_of(int number);

// For backwards of csrc/device/columns.cuh that sum over rows: how many threads walk down the rows
// side by side, two rows at a time. width: of dy, whose vectors are the threads beside each other.
int64_t chains_of(const Tensor& dy, int64_t rows, int64_t width);

// Makes a tensor's device the current one while launches last.
class OnDeviceOf {
 public:
#ifdef BERTFAST_HOST
  explicit OnDeviceOf(const Tensor&) {}
#else
  explicit OnDeviceOf(const Tensor& tensor);
  ~OnDeviceOf();

 private:
  int previous_ = 0;
  bool changed_ = false;
#endif
};

}  // namespace bertfast
