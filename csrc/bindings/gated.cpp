// gated's calls: bertfast/ops/gated/cuda.py.
#include <stdexcept>

#include "bindings/call.h"
#include "bindings/module.h"
#include "bindings/tensor.h"

namespace bertfast {
namespace of_gated {

// Of a tensor as wide as a result of the op, dense or in rows of its own.
struct Size {
  int rows, cols;

  explicit Size(const Tensor& y) {
    const int64_t count = y.numel();
    if (count < 1) throw std::invalid_argument("there must be elements");
    cols = at_least_one(y.size(-1), "the number of columns");
    at_least_one(2 * int64_t(cols), "the number of columns of x");
    rows = at_least_one(count / cols, "the number of rows");
  }
};

void forward(py::handle x, py::handle bias, int activation, bool second, py::handle y) {
  Operands operands;
  const Tensor in = operands.tensor(x, "x"), out = operands.tensor(y, "y");
  const DType dtype = in.dtype();
  const Size size(out);
  const Rows from = rows(in, element(dtype), size.rows, 2 * int64_t(size.cols));
  GatedForward p{};
  p.x = from.data;
  p.bias = operands.dense_or_none(bias, "bias", dtype, 2 * int64_t(size.cols));
  p.y = dense(out, element(dtype), int64_t(size.rows) * size.cols);
  p.rows = size.rows;
  p.x_row_stride = from.stride;
  p.cols = size.cols;
  p.activated = second ? size.cols : 0;
  p.gate = size.cols - p.activated;
  const OnDeviceOf guard(in);
  check(launch_gated_forward(p, activation_of(activation), dtype, in.stream()),
        "launching gated's forward");
}

// The shape of the partial sums for dbias that a backward works in: (chains, columns of x).
py::tuple partial_shape(py::handle dy) {
  const Tensor in(dy, "dy");
  const Size size(in);
  return py::make_tuple(chains_of(in, size.rows, size.cols), 2 * int64_t(size.cols));
}

// partial: what partial_shape says, if dbias is wanted, which it can only be where bias is.
void backward(py::handle dy, py::handle x, py::handle bias, int activation, bool second,
              py::handle dx, py::handle dbias, py::handle partial) {
  Operands operands;
  const Tensor gradient = operands.tensor(dy, "dy"), in = operands.tensor(x, "x");
  const DType dtype = gradient.dtype();
  const Size size(gradient);
  const int64_t wide = 2 * int64_t(size.cols);
  const Rows from = rows(gradient, element(dtype), size.rows, size.cols);
  const Rows x_from = rows(in, element(dtype), size.rows, wide);
  GatedBackward p{};
  p.dy = from.data;
  p.x = x_from.data;
  p.bias = operands.dense_or_none(bias, "bias", dtype, wide);
  p.dx = operands.dense(dx, "dx", dtype, size.rows * wide);
  p.rows = size.rows;
  p.dy_row_stride = from.stride;
  p.x_row_stride = x_from.stride;
  p.cols = size.cols;
  p.activated = second ? size.cols : 0;
  p.gate = size.cols - p.activated;
  int64_t chains = chains_of(gradient, size.rows, size.cols);
  void* sum = nullptr;
  if (!dbias.is_none()) {
    if (!p.bias) throw std::invalid_argument("dbias needs a bias");
    const Tensor partials = operands.tensor(partial, "partial");
    chains = partials.dim() == 2 ? partials.size(0) : 0;
    p.partial_dbias = static_cast<float*>(dense(partials, Element::kFloat32, chains * wide));
    sum = operands.dense(dbias, "dbias", dtype, wide);
  }
  p.chains = at_least_one(chains, "the number of chains");
  const OnDeviceOf guard(gradient);
  const Stream stream = gradient.stream();
  check(launch_gated_backward(p, activation_of(activation), dtype, stream),
        "launching gated's backward");
  if (sum) {
    check(launch_column_sum({p.partial_dbias, {sum}, 1, p.chains, static_cast<int>(wide)}, dtype,
                            stream),
          "launching gated's sum");
  }
}

const Binding binding([](py::module_& m) {
  m.def("gated_forward", &forward, py::arg("x"), py::arg("bias"), py::arg("activation"),
        py::arg("second"), py::arg("y"));
  m.def("gated_partial_shape", &partial_shape, py::arg("dy"));
  m.def("gated_backward", &backward, py::arg("dy"), py::arg("x"), py::arg("bias"),
        py::arg("activation"), py::arg("second"), py::arg("dx"), py::arg("dbias"),
        py::arg("partial"));
});

}  // namespace of_gated
}  // namespace bertfast
