// linear_gated's calls: bertfast/ops/linear_gated/cuda.py.
#include "bindings/module.h"
#include "bindings/product.h"

namespace bertfast {
namespace of_linear_gated {

void forward(py::handle x, py::handle weight, py::handle bias, int activation, py::handle y,
             py::handle u) {
  Operands operands;
  const Tensor left = operands.tensor(x, "x");
  LinearGatedForward p{};
  fill(p, 2, operands, left, weight, bias, y, u);
  p.activation = activation_of(activation);
  const OnDeviceOf guard(left);
  check(launch_linear_gated_forward(p, left.dtype(), left.stream()),
        "launching linear_gated's forward");
}

void backward(py::handle dy, py::handle weight, py::handle u, py::handle bias, int activation,
              py::handle du, py::handle dbias, py::handle partial) {
  Operands operands;
  const Tensor left = operands.tensor(dy, "dy");
  LinearGatedBackward p{};
  const ColumnSum sum = fill(p, 2, operands, left, weight, u, bias, du, dbias, partial);
  p.activation = activation_of(activation);
  const OnDeviceOf guard(left);
  const Stream stream = left.stream();
  check(launch_linear_gated_backward(p, left.dtype(), stream), "launching linear_gated's backward");
  if (sum.sums) check(launch_column_sum(sum, left.dtype(), stream), "launching linear_gated's sum");
}

const Binding binding([](py::module_& m) {
  m.def("linear_gated_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("activation"), py::arg("y"), py::arg("u"));
  m.def("linear_gated_partial_shape", &product_partial_shape, py::arg("u"));
  m.def("linear_gated_backward", &backward, py::arg("dy"), py::arg("weight"), py::arg("u"),
        py::arg("bias"), py::arg("activation"), py::arg("du"), py::arg("dbias"),
        py::arg("partial"));
});

}  // namespace of_linear_gated
}  // namespace bertfast
