// What the calls of products with an activation have in common, whether it is gated or not: halves
// is 2 or 1, and says how often as wide as y the saved u, its gradient, the bias and the forward's
// weight are.
#pragma once

#include "bindings/call.h"
#include "bindings/tensor.h"

namespace bertfast {

// The call's dtype: that of a product's left operand.
DType product_dtype(const Tensor& left);

// All but how it is activated.
void fill(LinearGeluForward& p, int halves, Operands& operands, const Tensor& x, py::handle weight,
          py::handle bias, py::handle y, py::handle u);

// The shape of the partial sums for dbias that a backward works in: (tiles of rows, columns of u).
py::tuple product_partial_shape(py::handle u);

// The same of the backward, whose gradient is du. Its sums are then to be added, where dbias is
// wanted; partial is what product_partial_shape says.
ColumnSum fill(LinearGeluBackward& p, int halves, Operands& operands, const Tensor& dy,
               py::handle weight, py::handle u, py::handle bias, py::handle du, py::handle dbias,
               py::handle partial);

}  // namespace bertfast
