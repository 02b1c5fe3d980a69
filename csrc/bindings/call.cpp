#include "bindings/call.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace bertfast {
namespace {

// A thread of a backward adds at most this many rows in one float32 chain before the compensated
// final sum: what that rounds is within the error budget, whatever the number of rows.
constexpr int kLongestChain = 32;
constexpr int kRowsAtATime = 2;
// Threads that fill a GPU: 800 on each of 128 multiprocessors, where registers leave room for 960,
// so that they begin together on a smaller one too. Each has 64 bytes of loads under way, or more.
constexpr int64_t kThreads = 800 * 128;

}  // namespace

Members::Members(py::handle tuple, Py_ssize_t count, const char* name) : tuple_(tuple) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != count) {
    throw py::type_error(std::string(name) + " must be a tuple of " + std::to_string(count));
  }
}

int64_t integer(py::handle object) {
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

double number(py::handle object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1. && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

int at_least_one(int64_t value, const char* name) {
  if (value < 1 || value > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(std::string(name) + " must be between 1 and 2**31 - 1, got " +
                                std::to_string(value));
  }
  return static_cast<int>(value);
}

Dropout::Dropout(Operands& operands, py::handle tuple, int64_t row_count) {
  const Members members(tuple, 5, "dropout");
  const int64_t threshold = integer(members[1]);
  if (threshold == 0) return;
  if (threshold < 0 || threshold > 65536) {
    throw std::invalid_argument("dropout's threshold must be between 0 and 65536, got " +
                                std::to_string(threshold));
  }
  this->threshold = static_cast<uint32_t>(threshold);
  seed = operands.dense<int64_t>(members[0], "seed", 1);
  keep_scale = static_cast<float>(number(members[2]));
  site = static_cast<uint32_t>(integer(members[3]));
  rows = operands.dense_or_none<int64_t>(members[4], "dropout's rows", row_count);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
  }
}

int bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

Activation activation_of(int number) {
  if (number < 0 || number > static_cast<int>(Activation::kSilu)) {
    throw std::invalid_argument("the activation must be 0, 1 or 2");
  }
  return static_cast<Activation>(number);
}

int64_t chain(int64_t groups, int64_t side_by_side, int64_t longest) {
  const auto per = [](int64_t a, int64_t b) { return (a - 1) / b + 1; };
  return per(groups, side_by_side * per(groups, side_by_side * longest));
}

int64_t chains_of(const Tensor& dy, int64_t rows, int64_t width) {
  const int64_t vectors = (width * bytes_of(dy.dtype()) + 15) / 16;
  const int64_t side_by_side = std::max<int64_t>(1, kThreads / vectors);
  const int64_t groups = (rows - 1) / kRowsAtATime + 1;
  return (groups - 1) / chain(groups, side_by_side, kLongestChain / kRowsAtATime) + 1;
}

#ifndef BERTFAST_HOST

OnDeviceOf::OnDeviceOf(const Tensor& tensor) {
  const int device = tensor.device().index;
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  changed_ = device != previous_;
  if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
}

OnDeviceOf::~OnDeviceOf() {
  if (changed_) cudaSetDevice(previous_);
}

#endif

}  // namespace bertfast
