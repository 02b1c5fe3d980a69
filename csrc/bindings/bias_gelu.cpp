// bias_gelu's calls: bertfast/ops/bias_gelu/cuda.py.
#include <stdexcept>

#include "bindings/call.h"
#include "bindings/module.h"
#include "bindings/tensor.h"

namespace bertfast {
namespace of_bias_gelu {

// A row, where there is no bias and no gap, so that the shape says nothing: what a block takes.
constexpr int kFlatBytes = 256 * 16;

// A launch's rows, and the first element, of what is otherwise in one piece.
struct Piece {
  int64_t rows, width, first;
};

struct Pieces {
  Piece piece[2];
  int count;
};

// One piece, or where rows mean nothing rows of kFlatBytes, and a shorter one for the rest.
// x: dense, or rows of their own.
Pieces split(const Tensor& x, bool flat, DType dtype) {
  const int64_t count = x.numel();
  if (count < 1) throw std::invalid_argument("there must be elements");
  if (!flat) {
    const int64_t width = at_least_one(x.dim() ? x.size(-1) : 1, "the number of columns");
    return {{{at_least_one(count / width, "the number of rows"), width, 0}}, 1};
  }
  const int64_t width = kFlatBytes / bytes_of(dtype);
  const int64_t rows = count / width, rest = count % width;
  Pieces pieces{{}, 0};
  if (rows) pieces.piece[pieces.count++] = {rows, width, 0};
  if (rest) pieces.piece[pieces.count++] = {1, rest, rows * width};
  return pieces;
}

// A tensor's rows of one piece, of which all has been looked at.
Rows rows_of(const Tensor& x, bool flat, DType dtype, const Piece& piece) {
  if (!flat) return rows(x, element(dtype), piece.rows, piece.width);
  char* const data = static_cast<char*>(dense(x, element(dtype), x.numel()));
  return {data + piece.first * bytes_of(dtype), static_cast<int>(piece.width)};
}

void forward(py::handle x, py::handle bias, bool tanh, py::handle y) {
  Operands operands;
  const Tensor in = operands.tensor(x, "x"), out = operands.tensor(y, "y");
  const DType x_dtype = in.dtype(), dtype = out.dtype();
  if (x_dtype != dtype && dtype != DType::kFloat32) out.refuse("float32, or of x's dtype");
  const bool flat = bias.is_none() && in.is_dense();
  const Pieces pieces = split(in, flat, dtype);
  char* const to = static_cast<char*>(dense(out, element(dtype), in.numel()));
  const OnDeviceOf guard(in);
  const Stream stream = in.stream();
  for (int i = 0; i < pieces.count; ++i) {
    const Piece& piece = pieces.piece[i];
    const Rows from = rows_of(in, flat, x_dtype, piece);
    BiasGeluForward p{};
    p.x = from.data;
    p.bias = operands.dense_or_none(bias, "bias", dtype, piece.width);
    p.y = to + piece.first * bytes_of(dtype);
    p.rows = at_least_one(piece.rows, "the number of rows");
    p.x_row_stride = from.stride;
    p.cols = at_least_one(piece.width, "the number of columns");
    check(launch_bias_gelu_forward(p, tanh, x_dtype, dtype, stream),
          "launching bias_gelu's forward");
  }
}

// The shape of the partial sums for dbias that a backward works in: (chains, columns).
py::tuple partial_shape(py::handle dy) {
  const Tensor in(dy, "dy");
  const Piece piece = split(in, false, in.dtype()).piece[0];
  return py::make_tuple(chains_of(in, piece.rows, piece.width), piece.width);
}

// partial: what partial_shape says, if dbias is wanted.
void backward(py::handle dy, py::handle x, py::handle bias, bool tanh, py::handle dx,
              py::handle dbias, py::handle partial) {
  Operands operands;
  const Tensor gradient = operands.tensor(dy, "dy"), in = operands.tensor(x, "x");
  const DType dtype = gradient.dtype(), x_dtype = in.dtype();
  if (x_dtype != dtype && dtype != DType::kFloat32) gradient.refuse("float32, or of x's dtype");
  const bool flat = bias.is_none() && dbias.is_none() && gradient.is_dense() && in.is_dense();
  const Pieces pieces = split(gradient, flat, dtype);
  if (in.numel() != gradient.numel()) in.refuse("as many elements as dy has");
  char* const to = static_cast<char*>(operands.dense(dx, "dx", x_dtype, gradient.numel()));
  const OnDeviceOf guard(gradient);
  const Stream stream = gradient.stream();
  for (int i = 0; i < pieces.count; ++i) {
    const Piece& piece = pieces.piece[i];
    const Rows from = rows_of(gradient, flat, dtype, piece);
    const Rows x_from = rows_of(in, flat, x_dtype, piece);
    BiasGeluBackward p{};
    p.dy = from.data;
    p.x = x_from.data;
    p.bias = operands.dense_or_none(bias, "bias", dtype, piece.width);
    p.dx = to + piece.first * bytes_of(x_dtype);
    p.rows = at_least_one(piece.rows, "the number of rows");
    p.dy_row_stride = from.stride;
    p.x_row_stride = x_from.stride;
    p.cols = at_least_one(piece.width, "the number of columns");
    int64_t chains = chains_of(gradient, piece.rows, piece.width);
    void* sum = nullptr;
    if (!dbias.is_none()) {
      const Tensor partials = operands.tensor(partial, "partial");
      chains = partials.dim() == 2 ? partials.size(0) : 0;
      p.partial_dbias =
          static_cast<float*>(dense(partials, Element::kFloat32, chains * piece.width));
      sum = operands.dense(dbias, "dbias", dtype, piece.width);
    }
    p.chains = at_least_one(chains, "the number of chains");
    check(launch_bias_gelu_backward(p, tanh, x_dtype, dtype, stream),
          "launching bias_gelu's backward");
    if (sum) {
      check(launch_column_sum({p.partial_dbias, {sum}, 1, p.chains, p.cols}, dtype, stream),
            "launching bias_gelu's sum");
    }
  }
}

const Binding binding([](py::module_& m) {
  m.def("bias_gelu_forward", &forward, py::arg("x"), py::arg("bias"), py::arg("tanh"),
        py::arg("y"));
  m.def("bias_gelu_partial_shape", &partial_shape, py::arg("dy"));
  m.def("bias_gelu_backward", &backward, py::arg("dy"), py::arg("x"), py::arg("bias"),
        py::arg("tanh"), py::arg("dx"), py::arg("dbias"), py::arg("partial"));
});

}  // namespace of_bias_gelu
}  // namespace bertfast
