#include "bindings/product.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace bertfast {
namespace {

constexpr int kMultiple = 8;  // of widths and strides: 16 bytes
constexpr int64_t kMostWidth = int64_t(1) << 24;
constexpr int64_t kMostRows = int64_t(1) << 30;

bool begins_at_16(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data()) % 16 == 0;
}

// Of several halves each one's.
int width(int64_t value, const char* name, int halves = 1) {
  const int multiple = kMultiple * halves;
  if (value % multiple) {
    throw std::invalid_argument(std::string(name) + " must be a multiple of " +
                                std::to_string(multiple) + ", got " + std::to_string(value));
  }
  if (value > kMostWidth) {
    throw std::invalid_argument(std::string(name) + " must be at most 2**24, got " +
                                std::to_string(value));
  }
  return at_least_one(value, name) / halves;
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

Tensor matrix(Operands& operands, py::handle object, const char* name) {
  const Tensor found = operands.tensor(object, name);
  if (found.dim() != 2) found.refuse("a matrix");
  return found;
}

int64_t row_tiles(int64_t rows) {
  return (rows + linear_gelu_tile_rows() - 1) / linear_gelu_tile_rows();
}

}  // namespace

DType product_dtype(const Tensor& left) {
  const DType dtype = left.dtype();
  if (dtype == DType::kFloat32) left.refuse("float16 or bfloat16");
  return dtype;
}

void fill(LinearGeluForward& p, int halves, Operands& operands, const Tensor& x, py::handle weight,
          py::handle bias, py::handle y, py::handle u) {
  const DType dtype = product_dtype(x);
  p.rows = row_count(x);
  p.inner = width(x.size(1), "the number of inputs");
  const Tensor right = matrix(operands, weight, "weight");
  p.cols = width(right.size(0), "the number of outputs", halves);
  const int64_t wide = int64_t(halves) * p.cols;
  const Rows from = rows_of(x, dtype, p.rows, p.inner);
  const Rows by = rows_of(right, dtype, wide, p.inner);
  p.x = from.data;
  p.x_row_stride = from.stride;
  p.weight = by.data;
  p.weight_row_stride = by.stride;
  if (!bias.is_none()) p.bias = vectors(operands.tensor(bias, "bias"), dtype, wide);
  p.y = vectors(operands.tensor(y, "y"), dtype, int64_t(p.rows) * p.cols);
  if (!u.is_none()) p.u = vectors(operands.tensor(u, "u"), dtype, p.rows * wide);
}

py::tuple product_partial_shape(py::handle u) {
  const Tensor pre(u, "u");
  return py::make_tuple(row_tiles(row_count(pre)), pre.size(1));
}

ColumnSum fill(LinearGeluBackward& p, int halves, Operands& operands, const Tensor& dy,
               py::handle weight, py::handle u, py::handle bias, py::handle du, py::handle dbias,
               py::handle partial) {
  const DType dtype = product_dtype(dy);
  p.rows = row_count(dy);
  p.inner = width(dy.size(1), "the number of inputs");
  const Tensor right = matrix(operands, weight, "weight");
  p.cols = width(halves * right.size(1), "the number of outputs", halves);
  const int wide = halves * p.cols;
  const Rows from = rows_of(dy, dtype, p.rows, p.inner);
  const Rows by = rows_of(right, dtype, p.inner, p.cols);
  p.dy = from.data;
  p.dy_row_stride = from.stride;
  p.weight = by.data;
  p.weight_row_stride = by.stride;
  p.u = vectors(operands.tensor(u, "u"), dtype, int64_t(p.rows) * wide);
  if (!bias.is_none()) p.bias = vectors(operands.tensor(bias, "bias"), dtype, wide);
  p.dv = vectors(operands.tensor(du, halves == 1 ? "dv" : "du"), dtype, int64_t(p.rows) * wide);
  const int tiles = static_cast<int>(row_tiles(p.rows));
  if (dbias.is_none()) return {};
  p.partial_dbias = operands.dense<float>(partial, "partial", int64_t(tiles) * wide);
  void* const sum = operands.dense(dbias, "dbias", dtype, wide);
  return {p.partial_dbias, {sum}, 1, tiles, wide};
}

}  // namespace bertfast
