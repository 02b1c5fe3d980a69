// linear_gelu's calls: bertfast/ops/linear/cuda.py.
#include "bindings/module.h"
#include "bindings/product.h"

namespace bertfast {
namespace of_linear_gelu {

void forward(py::handle x, py::handle weight, py::handle bias, bool tanh, py::handle y,
             py::handle u) {
  Operands operands;
  const Tensor left = operands.tensor(x, "x");
  LinearGeluForward p{};
  fill(p, 1, operands, left, weight, bias, y, u);
  const OnDeviceOf guard(left);
  check(launch_linear_gelu_forward(p, tanh, left.dtype(), left.stream()),
        "launching linear_gelu's forward");
}

void backward(py::handle dy, py::handle weight, py::handle u, py::handle bias, bool tanh,
              py::handle dv, py::handle dbias, py::handle partial) {
  Operands operands;
  const Tensor left = operands.tensor(dy, "dy");
  LinearGeluBackward p{};
  const ColumnSum sum = fill(p, 1, operands, left, weight, u, bias, dv, dbias, partial);
  const OnDeviceOf guard(left);
  const Stream stream = left.stream();
  check(launch_linear_gelu_backward(p, tanh, left.dtype(), stream),
        "launching linear_gelu's backward");
  if (sum.sums) check(launch_column_sum(sum, left.dtype(), stream), "launching linear_gelu's sum");
}

const Binding binding([](py::module_& m) {
  m.def("linear_gelu_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("tanh"), py::arg("y"), py::arg("u"));
  m.def("linear_gelu_partial_shape", &product_partial_shape, py::arg("u"));
  m.def("linear_gelu_backward", &backward, py::arg("dy"), py::arg("weight"), py::arg("u"),
        py::arg("bias"), py::arg("tanh"), py::arg("dv"), py::arg("dbias"), py::arg("partial"));
});

}  // namespace of_linear_gelu
}  // namespace bertfast
