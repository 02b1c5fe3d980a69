// linear_gelu's calls: bertfast/ops/linear/cuda.py.
#include <stdexcept>
#include <string>

#include "bindings/call.h"
#include "bindings/module.h"
#include "bindings/tensor.h"

namespace bertfast {
namespace {

constexpr int kMultiple = 8;  // of widths and strides: 16 bytes
constexpr int64_t kMostWidth = int64_t(1) << 24;
constexpr int64_t kMostRows = int64_t(1) << 30;

bool begins_at_16(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
}

int width(int64_t value, const char* name) {
  if (value % kMultiple) {
    throw std::invalid_argument(std::string(name) + " must be a multiple of 8, got " +
                                std::to_string(value));
  }
  if (value > kMostWidth) {
    throw std::invalid_argument(std::string(name) + " must be at most 2**24, got " +
                                std::to_string(value));
  }
  return at_least_one(value, name);
}

int row_count(const Tensor& x) {
  if (x.dim() != 2) x.refuse("a matrix");
  if (x.size(0) > kMostRows) {
    throw std::invalid_argument("there must be at most 2**30 rows, got " +
                                std::to_string(x.size(0)));
  }
  return at_least_one(x.size(0), "the number of rows");
}

// A matrix whose rows are 16-byte vectors.
Rows rows_of(const Tensor& x, DType dtype, int64_t count, int64_t width) {
  const Rows found = rows(x, element(dtype), count, width);
  if (!begins_at_16(x) || found.stride % kMultiple) {
    x.refuse("rows that begin at multiples of 16 bytes");
  }
  return found;
}

char* vectors(const Tensor& x, DType dtype, int64_t count) {
  void* const data = dense(x, element(dtype), count);
  if (!begins_at_16(x)) x.refuse("values that begin at a multiple of 16 bytes");
  return static_cast<char*>(data);
}

// The call's dtype: that of a product's left operand.
DType dtype_of(const Tensor& x) {
  const DType dtype = x.dtype();
  if (dtype == DType::kFloat32) x.refuse("float16 or bfloat16");
  return dtype;
}

void forward(py::handle x, py::handle weight, py::handle bias, bool tanh, py::handle y,
             py::handle u) {
  Operands operands;
  const Tensor left = operands.tensor(x, "x"), right = operands.tensor(weight, "weight");
  const DType dtype = dtype_of(left);
  LinearGeluForward p{};
  p.rows = row_count(left);
  p.inner = width(left.size(1), "the number of inputs");
  if (right.dim() != 2) right.refuse("a matrix");
  p.cols = width(right.size(0), "the number of outputs");
  const Rows from = rows_of(left, dtype, p.rows, p.inner);
  const Rows by = rows_of(right, dtype, p.cols, p.inner);
  const int64_t count = int64_t(p.rows) * p.cols;
  p.x = from.data;
  p.x_row_stride = from.stride;
  p.weight = by.data;
  p.weight_row_stride = by.stride;
  if (!bias.is_none()) p.bias = vectors(operands.tensor(bias, "bias"), dtype, p.cols);
  p.y = vectors(operands.tensor(y, "y"), dtype, count);
  if (!u.is_none()) p.u = vectors(operands.tensor(u, "u"), dtype, count);
  const OnDeviceOf guard(left);
  check(launch_linear_gelu_forward(p, tanh, dtype, left.stream()),
        "launching linear_gelu's forward");
}

int64_t row_tiles(int64_t rows) {
  return (rows + linear_gelu_tile_rows() - 1) / linear_gelu_tile_rows();
}

// The shape of the partial sums for dbias that a backward works in: (tiles of rows, columns).
py::tuple partial_shape(py::handle u) {
  const Tensor pre(u, "u");
  return py::make_tuple(row_tiles(row_count(pre)), pre.size(1));
}

// partial: what partial_shape says, if dbias is wanted.
void backward(py::handle dy, py::handle weight, py::handle u, py::handle bias, bool tanh,
              py::handle dv, py::handle dbias, py::handle partial) {
  Operands operands;
  const Tensor left = operands.tensor(dy, "dy"), right = operands.tensor(weight, "weight");
  const DType dtype = dtype_of(left);
  LinearGeluBackward p{};
  p.rows = row_count(left);
  p.inner = width(left.size(1), "the number of inputs");
  if (right.dim() != 2) right.refuse("a matrix");
  p.cols = width(right.size(1), "the number of outputs");
  const Rows from = rows_of(left, dtype, p.rows, p.inner);
  const Rows by = rows_of(right, dtype, p.inner, p.cols);
  const int64_t count = int64_t(p.rows) * p.cols;
  p.dy = from.data;
  p.dy_row_stride = from.stride;
  p.weight = by.data;
  p.weight_row_stride = by.stride;
  p.u = vectors(operands.tensor(u, "u"), dtype, count);
  if (!bias.is_none()) p.bias = vectors(operands.tensor(bias, "bias"), dtype, p.cols);
  p.dv = vectors(operands.tensor(dv, "dv"), dtype, count);
  const int tiles = static_cast<int>(row_tiles(p.rows));
  void* sum = nullptr;
  if (!dbias.is_none()) {
    p.partial_dbias = operands.dense<float>(partial, "partial", int64_t(tiles) * p.cols);
    sum = operands.dense(dbias, "dbias", dtype, p.cols);
  }
  const OnDeviceOf guard(left);
  const Stream stream = left.stream();
  check(launch_linear_gelu_backward(p, tanh, dtype, stream), "launching linear_gelu's backward");
  if (sum) {
    check(launch_column_sum({p.partial_dbias, {sum}, 1, tiles, p.cols}, dtype, stream),
          "launching linear_gelu's sum");
  }
}

const Binding binding([](py::module_& m) {
  m.def("linear_gelu_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("tanh"), py::arg("y"), py::arg("u"));
  m.def("linear_gelu_partial_shape", &partial_shape, py::arg("u"));
  m.def("linear_gelu_backward", &backward, py::arg("dy"), py::arg("weight"), py::arg("u"),
        py::arg("bias"), py::arg("tanh"), py::arg("dv"), py::arg("dbias"), py::arg("partial"));
});

}  // namespace
}  // namespace bertfast
