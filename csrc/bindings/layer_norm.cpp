// layer_norm's calls: bertfast/ops/layer_norm/cuda.py.
#include <stdexcept>
#include <string>

#include "bindings/call.h"
#include "bindings/module.h"
#include "bindings/tensor.h"

namespace bertfast {
namespace of_layer_norm {

// A row group adds at most this many rows in one float32 chain before the compensated final sum:
// what that rounds is within the error budget, whatever the number of rows.
constexpr int kLongestChain = 32;
// Of the GPU that the blocks are to fill. Others have about as many.
constexpr int kMultiprocessors = 128;

// The length of the last dimension.
int columns(const Tensor& x) {
  const int64_t cols = x.dim() ? x.size(-1) : 0;
  if (cols < 1 || cols > 8192) {
    throw std::invalid_argument("a row must have between 1 and 8192 columns, got " +
                                std::to_string(cols));
  }
  return static_cast<int>(cols);
}

int rows_of(const Tensor& x, int64_t cols) {
  return at_least_one(x.numel() / cols, "the number of rows");
}

void forward(py::handle x, py::handle residual, py::handle x_bias, py::handle norm,
             py::handle dropout, py::handle outs) {
  const Members wanted(outs, 5, "outs");
  Operands operands;
  const Tensor x_rows = operands.tensor(x, "x"), y = operands.tensor(wanted[0], "y");
  const DType x_dtype = x_rows.dtype(), dtype = y.dtype();
  if (x_dtype != dtype && dtype != DType::kFloat32) y.refuse("float32, or of x's dtype");
  const int64_t cols = columns(x_rows), rows = rows_of(x_rows, cols);
  const Rows x_at = bertfast::rows(x_rows, element(x_dtype), rows, cols);
  const Rows residual_at = residual.is_none()
                               ? Rows{nullptr, static_cast<int>(cols)}
                               : operands.rows(residual, "residual", dtype, rows, cols);
  const Dropout drops(operands, dropout, rows);
  LayerNormForwardFurther p;
  p.x = x_at.data;
  p.residual = residual_at.data;
  p.x_bias = operands.dense_or_none(x_bias, "x_bias", dtype, cols);
  p.weight = p.bias = nullptr;
  p.rms = false;
  p.eps = 0.f;
  if (!norm.is_none()) {
    const Members norms(norm, 4, "norm");
    p.weight = operands.dense(norms[0], "weight", dtype, cols);
    p.bias = operands.dense_or_none(norms[1], "bias", dtype, cols);
    p.eps = static_cast<float>(number(norms[2]));
    p.rms = PyObject_IsTrue(norms[3].ptr()) == 1;
  }
  p.seed = drops.seed;
  p.row_index = drops.rows;
  p.y = dense(y, element(dtype), rows * cols);
  p.z = operands.dense_or_none(wanted[1], "z", dtype, rows * cols);
  p.mean = operands.dense_or_none<float>(wanted[2], "mean", rows);
  p.rstd = operands.dense_or_none<float>(wanted[3], "rstd", rows);
  if ((p.mean == nullptr) != (p.rstd == nullptr || p.rms)) {
    throw std::invalid_argument("mean and rstd are both wanted, or neither is; no mean of RMSNorm");
  }
  if (p.rstd && !p.weight) throw std::invalid_argument("nothing is normalised: there is no rstd");
  p.copy = nullptr;
  if (!wanted[4].is_none()) {
    if (x_dtype == dtype) y.refuse("wider than x, where a copy in x's dtype is wanted");
    p.copy = operands.dense(wanted[4], "copy", x_dtype, rows * cols);
  }
  p.rows = static_cast<int>(rows);
  p.x_row_stride = x_at.stride;
  p.residual_row_stride = residual_at.stride;
  p.cols = static_cast<int>(cols);
  p.inv_cols = 1.f / static_cast<float>(cols);
  p.keep_scale = drops.keep_scale;
  p.threshold = drops.threshold;
  p.site = drops.site;
  const OnDeviceOf guard(x_rows);
  check(launch_layer_norm_forward(p, x_dtype, dtype, x_rows.stream()),
        "launching layer_norm's forward");
}

// The sums over rows that are wanted of Gradients(dz, dx, dweight, dbias, dx_bias).
struct Sums {
  bool weight, bias, x_bias;
  int count;

  explicit Sums(const Members& grads)
      : weight(!grads[2].is_none()),
        bias(!grads[3].is_none()),
        x_bias(!grads[4].is_none()),
        count(weight + bias + x_bias) {
    if (bias && !weight) throw std::invalid_argument("dbias is wanted with dweight only");
  }
};

// The shape of the partial sums that a backward works in: (sums, blocks, columns).
py::tuple partial_shape(py::handle dy, py::handle grads) {
  const Tensor dy_rows(dy, "dy");
  const int cols = columns(dy_rows);
  const int64_t rows = rows_of(dy_rows, cols);
  const RowBlock block = layer_norm_backward_block(cols, dy_rows.dtype());
  const int64_t groups = (rows - 1) / block.rows + 1;
  const int64_t side_by_side = kMultiprocessors * block.per_multiprocessor;
  const int64_t blocks = (groups - 1) / chain(groups, side_by_side, kLongestChain) + 1;
  return py::make_tuple(Sums(Members(grads, 5, "grads")).count, blocks, cols);
}

void backward(py::handle dy, py::handle dsum, py::handle saved, py::handle weight,
              py::handle dropout, py::handle grads, py::handle partial) {
  const Members wanted(grads, 5, "grads"), statistics(saved, 3, "saved");
  const Sums sums(wanted);
  Operands operands;
  const Tensor dy_rows = operands.tensor(dy, "dy"), partials = operands.tensor(partial, "partial");
  const DType dtype = dy_rows.dtype();
  const int64_t cols = columns(dy_rows), rows = rows_of(dy_rows, cols);
  const int64_t blocks = partials.dim() == 3 ? partials.size(1) : 0;
  const Rows dy_at = bertfast::rows(dy_rows, element(dtype), rows, cols);
  const auto rows_or_none = [&](py::handle tensor, const char* name) {
    return tensor.is_none() ? Rows{nullptr, static_cast<int>(cols)}
                            : operands.rows(tensor, name, dtype, rows, cols);
  };
  const Rows dsum_at = rows_or_none(dsum, "dsum"), z_at = rows_or_none(statistics[0], "z");
  const Dropout drops(operands, dropout, rows);
  DType x_dtype = dtype;
  LayerNormBackwardFurther p;
  p.dx = nullptr;
  if (!wanted[1].is_none()) {
    const Tensor dx = operands.tensor(wanted[1], "dx");
    x_dtype = dx.dtype();
    if (x_dtype != dtype && dtype != DType::kFloat32)
      dx.refuse("of dy's dtype, where that has 16 bits");
    p.dx = dense(dx, element(x_dtype), rows * cols);
  }
  p.dy = dy_at.data;
  p.z = z_at.data;
  p.dsum = dsum_at.data;
  p.dsum_row_stride = dsum_at.stride;
  p.mean = operands.dense_or_none<float>(statistics[1], "mean", rows);
  p.rstd = operands.dense_or_none<float>(statistics[2], "rstd", rows);
  p.weight = operands.dense_or_none(weight, "weight", dtype, cols);
  if (!p.z != !p.weight || !p.rstd != !p.weight || (p.mean && !p.weight)) {
    throw std::invalid_argument("z, rstd and weight are all given, or none is");
  }
  if (!p.weight && sums.weight) throw std::invalid_argument("there is no weight, nor dweight");
  p.seed = drops.seed;
  p.row_index = drops.rows;
  p.dz = operands.dense_or_none(wanted[0], "dz", dtype, rows * cols);
  p.blocks = at_least_one(blocks, "the number of blocks");
  const int64_t size = blocks * cols;  // of one sum's part
  auto* const first = static_cast<float*>(dense(partials, Element::kFloat32, sums.count * size));
  p.partial_dweight = sums.weight ? first : nullptr;
  p.partial_dbias = sums.bias ? first + size : nullptr;
  p.partial_dx_bias = sums.x_bias ? first + (sums.count - 1) * size : nullptr;
  p.rows = static_cast<int>(rows);
  p.dy_row_stride = dy_at.stride;
  p.z_row_stride = z_at.stride;
  p.cols = static_cast<int>(cols);
  p.inv_cols = 1.f / static_cast<float>(cols);
  p.keep_scale = drops.keep_scale;
  p.threshold = drops.threshold;
  p.site = drops.site;

  ColumnSum sum{first, {}, sums.count, p.blocks, p.cols};
  int next = 0;
  if (sums.weight) sum.out[next++] = operands.dense(wanted[2], "dweight", dtype, cols);
  if (sums.bias) sum.out[next++] = operands.dense(wanted[3], "dbias", dtype, cols);
  if (sums.x_bias) sum.out[next++] = operands.dense(wanted[4], "dx_bias", dtype, cols);
  const OnDeviceOf guard(dy_rows);
  const Stream stream = dy_rows.stream();
  check(launch_layer_norm_backward(p, x_dtype, dtype, stream), "launching layer_norm's backward");
  if (sums.count) check(launch_column_sum(sum, dtype, stream), "launching layer_norm's sums");
}

const Binding binding([](py::module_& m) {
  m.def("layer_norm_forward", &forward, py::arg("x"), py::arg("residual"), py::arg("x_bias"),
        py::arg("norm"), py::arg("dropout"), py::arg("outs"));
  m.def("layer_norm_partial_shape", &partial_shape, py::arg("dy"), py::arg("grads"));
  m.def("layer_norm_backward", &backward, py::arg("dy"), py::arg("dsum"), py::arg("saved"),
        py::arg("weight"), py::arg("dropout"), py::arg("grads"), py::arg("partial"));
});

}  // namespace of_layer_norm
}  // namespace bertfast
