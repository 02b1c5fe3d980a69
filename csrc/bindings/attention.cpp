// attention's calls: bertfast/ops/attention/cuda.py.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "bindings/call.h"
#include "bindings/module.h"
#include "bindings/tensor.h"

namespace bertfast {
namespace of_attention {

constexpr int kVector = 8;         // values in 16 bytes, which is how tiles are copied
constexpr int kMostColumns = 128;  // of a head
constexpr int kTile = 64;          // rows, and the blocks of scores of a bias's gradient
// The shared memory of a block holds a bit for each key of a masked row, beside its tiles.
constexpr int64_t kMostMaskedKeys = 1 << 17;
// From one token to the next: a kernel's offsets inside a tile have 32 bits.
constexpr int64_t kMostTokenStride = 1 << 23;
// Keys to a side of a query, as many as no sequence has: no window.
constexpr int64_t kNoLimit = 1 << 30;

// One tensor of heads, (batch, length, heads, head_dim) or packed (tokens, heads, head_dim), or one
// of three that lie in one buffer, (..., 3, heads, head_dim).
struct HeadsView {
  Tensor tensor;
  char* data;
  int64_t batch, length, heads, head_dim;
  int64_t batch_stride = 0, token_stride, head_stride;

  // part: of a buffer of three; -1: the tensor is one of heads.
  HeadsView(const Tensor& x, bool packed, int part = -1) : tensor(x), data(x.data()) {
    const int of_three = part < 0 ? 0 : 1;
    if (x.dim() != (packed ? 3 : 4) + of_three || (of_three && x.size(-3) != 3)) {
      x.refuse(std::string(packed ? "packed " : "padded ") + (of_three ? "q, k and v" : "heads"));
    }
    const bool dense = x.size(-1) == 1 || x.stride(-1) == 1;
    if (!dense) x.refuse("dense in its last dimension");
    const int token = -3 - of_three;
    batch = packed ? 1 : x.size(0);
    length = x.size(token);
    heads = x.size(-2);
    head_dim = x.size(-1);
    if (!packed) batch_stride = x.stride(0);
    token_stride = x.stride(token);
    head_stride = x.stride(-2);
    if (of_three) data += 2 * part * x.stride(-3);
  }

  // Whether a kernel can copy the heads where they are.
  bool in_vectors() const {
    const int64_t steps = batch_stride | token_stride | head_stride | head_dim;
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && steps % kVector == 0 &&
           token_stride < kMostTokenStride;
  }

  template<class Void>
  HeadRows<Void> rows() const {
    return {data, batch_stride, head_stride, static_cast<int>(token_stride)};
  }
};

// q, k and v, or their gradients: a tuple of three tensors, or one buffer.
struct ThreeHeads {
  HeadsView q, k, v;

  static ThreeHeads read(Operands& operands, py::handle heads, bool packed, bool gradients) {
    if (PyTuple_Check(heads.ptr())) {
      const Members members(heads, 3, "heads");
      return {{operands.tensor(members[0], gradients ? "dq" : "q"), packed},
              {operands.tensor(members[1], gradients ? "dk" : "k"), packed},
              {operands.tensor(members[2], gradients ? "dv" : "v"), packed}};
    }
    const Tensor buffer = operands.tensor(heads, gradients ? "dqkv" : "qkv");
    return {{buffer, packed, 0}, {buffer, packed, 1}, {buffer, packed, 2}};
  }
};

// What all tensors of a call have in common, and the batch that the kernels are told.
struct Batch {
  AttentionBatch p{};
  int64_t batch, length, heads, head_dim;  // as q has them
  DType dtype;

  Batch(Operands& operands, const HeadsView& q, const Members& sequences, py::handle scores,
        py::handle dropout)
      : batch(q.batch),
        length(q.length),
        heads(q.heads),
        head_dim(q.head_dim),
        dtype(q.tensor.dtype()) {
    if (dtype == DType::kFloat32) q.tensor.refuse("float16 or bfloat16");
    const py::handle key_mask = sequences[0], cu_seqlens = sequences[1], tiles = sequences[3];
    int64_t count = batch, longest = length;
    if (cu_seqlens.is_none()) {
      p.lse_batch = heads * length;
      p.lse_head = length;
    } else {
      const Tensor bounds = operands.tensor(cu_seqlens, "cu_seqlens");
      count = bounds.numel() - 1;
      longest = integer(sequences[2]);
      p.cu_seqlens = static_cast<int32_t*>(dense(bounds, Element::kInt32, count + 1));
      p.lse_head = length;
    }
    p.batch = at_least_one(count, "the number of sequences");
    p.length = at_least_one(longest, "the longest length");
    p.heads = at_least_one(heads, "the number of heads");
    if (head_dim < 1 || head_dim > kMostColumns) {
      throw std::invalid_argument("the head dimension must be between 1 and 128, got " +
                                  std::to_string(head_dim));
    }
    p.head_dim = static_cast<int>(head_dim);
    if (!scores.is_none()) read_scores(operands, scores);
    p.tile = 64;
    if (!tiles.is_none()) {
      if (!p.cu_seqlens) throw std::invalid_argument("tiles need cu_seqlens");
      const Tensor list = operands.tensor(tiles, "tiles");
      const int64_t entries = list.dim() == 2 ? list.size(0) : 0;
      p.tiles = static_cast<int32_t*>(dense(list, Element::kInt32, 3 * entries));
      p.plan_size = at_least_one(entries, "the number of tiles");
      p.tile = static_cast<int>(integer(sequences[4]));
      if (p.tile != 32 && p.tile != 64) throw std::invalid_argument("a tile must be 32 or 64");
    }
    if (!key_mask.is_none()) {
      if (p.cu_seqlens) throw std::invalid_argument("a packed batch has no key_mask");
      if (length > kMostMaskedKeys) {
        throw std::invalid_argument("a sequence with a key_mask has at most 2**17 tokens, got " +
                                    std::to_string(length));
      }
      const Rows mask = rows(operands.tensor(key_mask, "key_mask"), Element::kBool, batch, length);
      p.key_mask = reinterpret_cast<uint8_t*>(mask.data);
      p.mask_batch = mask.stride;
    }
    if (!dropout.is_none()) read_dropout(operands, dropout);
    const int64_t tiles_of_head =
        p.tiles ? p.plan_size : (int64_t(p.length) / 64 + 2) * int64_t(p.batch);
    if (tiles_of_head * p.heads > std::numeric_limits<int>::max()) {
      throw std::invalid_argument("batch * heads * length / 64 must stay below 2**31");
    }
  }

  // That a tensor has q's shape and dtype.
  void look_at(const HeadsView& x) const {
    if (x.tensor.dtype() != dtype || x.batch != batch || x.length != length || x.heads != heads ||
        x.head_dim != head_dim) {
      x.tensor.refuse(std::string("heads of q's shape in ") + name_of(element(dtype)));
    }
  }

  int64_t rows_of_heads() const { return batch * heads * length; }

 private:
  void read_dropout(Operands& operands, py::handle tuple) {
    const Dropout drops(operands, tuple, 0);
    p.seed = drops.seed;
    p.keep_scale = drops.keep_scale;
    // Where nothing is kept keep_scale is 0, and what 16 bits say doesn't matter.
    p.threshold = drops.threshold < 65536 ? drops.threshold : 65535;
    p.site = drops.site;
  }

  // Of bertfast.ops.attention.scores.Scores.
  void read_scores(Operands& operands, py::handle tuple) {
    const Members members(tuple, 6, "scores");
    AttentionScores& scores = p.scores;
    p.scale = static_cast<float>(number(members[0]));
    scores.left = side(members[4]);
    scores.right = side(members[5]);
    const bool windowed = std::min(scores.left, scores.right) < kNoLimit;
    if (!members[3].is_none()) {
      const Tensor bias = operands.tensor(members[3], "bias");
      const int64_t width = bias.dim() == 2 ? bias.size(1) : 0;
      if (width % 2 == 0) bias.refuse("a number for each head and distance");
      if (width / 2 >= kNoLimit) bias.refuse("distances below 2**30");
      scores.bias_dtype = bias.dtype();
      scores.bias = dense(bias, element(scores.bias_dtype), heads * width);
      scores.reach = static_cast<int>(width / 2);
    }
    scores.by_position = windowed || scores.bias;
    if (scores.by_position && p.length > kNoLimit) {
      throw std::invalid_argument("a sequence with a window or a bias has at most 2**30 tokens");
    }
    if (!members[1].is_none()) read_tables(operands, members[1], members[2]);
  }

  // Cosines and sines of rotary positions.
  void read_tables(Operands& operands, py::handle cosines, py::handle sines) {
    const Tensor cos = operands.tensor(cosines, "cos"), sin = operands.tensor(sines, "sin");
    const int64_t positions = cos.dim() == 2 ? cos.size(0) : 0;
    const int64_t half = cos.dim() == 2 ? cos.size(1) : 0;
    // Heads that were copied into whole vectors are wider.
    if (positions < p.length || half < 1 || 2 * half > head_dim) {
      cos.refuse("a row of half a head's columns for each position");
    }
    p.scores.half = static_cast<int>(half);
    for (const Tensor& table : {cos, sin}) {
      if (reinterpret_cast<uintptr_t>(table.data()) % 16) table.refuse("memory in whole vectors");
    }
    p.scores.cos = static_cast<float*>(dense(cos, Element::kFloat32, positions * half));
    p.scores.sin = static_cast<float*>(dense(sin, Element::kFloat32, positions * half));
  }

  // Keys to a side of a query.
  static int side(py::handle keys) {
    const int64_t count = integer(keys);
    if (count < 0) {
      throw std::invalid_argument("a window must have no less than 0 keys to a side, got " +
                                  std::to_string(count));
    }
    return static_cast<int>(std::min(count, kNoLimit));
  }
};

template<class... Views>
bool look_at_all(const Batch& batch, const Views&... views) {
  (batch.look_at(views), ...);
  return (views.in_vectors() && ...);
}

// Whether the heads lie in vectors, which is how the kernels copy them. If they don't nothing has
// been done.
bool forward(py::handle heads, py::handle sequences, py::handle scores, py::handle dropout,
             py::handle out, py::handle lse) {
  const Members layout(sequences, 6, "sequences");
  const bool packed = !layout[1].is_none();
  Operands operands;
  const ThreeHeads in = ThreeHeads::read(operands, heads, packed, false);
  const HeadsView to(operands.tensor(out, "out"), packed);
  const Batch batch(operands, in.q, layout, scores, dropout);
  AttentionForward p;
  p.batch = batch.p;
  p.lse = operands.dense_or_none<float>(lse, "lse", batch.rows_of_heads());
  if (!look_at_all(batch, in.q, in.k, in.v, to)) return false;
  p.q = in.q.rows<const void>();
  p.k = in.k.rows<const void>();
  p.v = in.v.rows<const void>();
  p.out = to.rows<void>();
  const OnDeviceOf guard(in.q.tensor);
  check(launch_attention_forward(p, batch.dtype, in.q.tensor.stream()),
        "launching attention's forward");
  return true;
}

// The same. statistics: two float32 values for each of lse.
bool backward(py::handle dout, py::handle heads, py::handle saved, py::handle sequences,
              py::handle scores, py::handle dropout, py::handle grads, py::handle statistics) {
  const Members layout(sequences, 6, "sequences"), kept(saved, 2, "saved");
  const bool packed = !layout[1].is_none();
  Operands operands;
  const ThreeHeads in = ThreeHeads::read(operands, heads, packed, false);
  const ThreeHeads to = ThreeHeads::read(operands, grads, packed, true);
  const HeadsView gradient(operands.tensor(dout, "dout"), packed);
  const HeadsView out(operands.tensor(kept[0], "out"), packed);
  const Batch batch(operands, in.q, layout, scores, dropout);
  const int64_t rows = batch.rows_of_heads();
  AttentionBackward p;
  p.batch = batch.p;
  p.lse = operands.dense<float>(kept[1], "lse", rows);
  p.statistics =
      reinterpret_cast<float2*>(operands.dense<float>(statistics, "statistics", 2 * rows));
  if (!look_at_all(batch, in.q, in.k, in.v, gradient, out, to.q, to.k, to.v)) return false;
  p.dout = gradient.rows<const void>();
  p.q = in.q.rows<const void>();
  p.k = in.k.rows<const void>();
  p.v = in.v.rows<const void>();
  p.out = out.rows<const void>();
  p.dq = to.q.rows<void>();
  p.dk = to.k.rows<void>();
  p.dv = to.v.rows<void>();
  const OnDeviceOf guard(in.q.tensor);
  check(launch_attention_backward(p, batch.dtype, in.q.tensor.stream()),
        "launching attention's backward");
  return true;
}

// Fills `rotated`, two tensors, with q and k by their positions. tables: cosines and sines.
void rotate(py::handle heads, py::handle sequences, py::handle tables, py::handle rotated) {
  const Members layout(sequences, 6, "sequences"), cos_and_sin(tables, 2, "tables");
  const Members outs(rotated, 2, "rotated");
  const bool packed = !layout[1].is_none();
  Operands operands;
  const ThreeHeads in = ThreeHeads::read(operands, heads, packed, false);
  const HeadsView to_q(operands.tensor(outs[0], "the rotated q"), packed);
  const HeadsView to_k(operands.tensor(outs[1], "the rotated k"), packed);
  const Batch batch(operands, in.q, layout, py::none(), py::none());
  for (const HeadsView& x : {in.q, in.k, to_q, to_k}) {
    batch.look_at(x);
    if (x.token_stride >= kMostTokenStride) x.tensor.refuse("tokens fewer than 2**23 apart");
  }
  const Tensor cos = operands.tensor(cos_and_sin[0], "cos");
  const Tensor sin = operands.tensor(cos_and_sin[1], "sin");
  const int64_t positions = cos.dim() == 2 ? cos.size(0) : 0;
  if (positions < batch.p.length || 2 * cos.size(1) != batch.head_dim) {
    cos.refuse("a row of half a head's columns for each position");
  }
  for (const Tensor& table : {cos, sin}) {
    if (reinterpret_cast<uintptr_t>(table.data()) % 16) table.refuse("memory in whole vectors");
  }
  AttentionRotation p;
  p.batch = batch.p;
  p.q = in.q.rows<const void>();
  p.k = in.k.rows<const void>();
  p.rotated_q = to_q.rows<void>();
  p.rotated_k = to_k.rows<void>();
  p.half = static_cast<int>(batch.head_dim / 2);
  p.cos = static_cast<float*>(dense(cos, Element::kFloat32, positions * p.half));
  p.sin = static_cast<float*>(dense(sin, Element::kFloat32, positions * p.half));
  const OnDeviceOf guard(in.q.tensor);
  check(launch_attention_rotate(p, batch.dtype, in.q.tensor.stream()),
        "launching attention's rotation");
}

// Of a sequence's blocks of scores, those that distance 0 is in being in the middle.
int64_t diagonals_of(int64_t length) {
  return 2 * ((length + kTile - 1) / kTile) + 1;
}

// The shape of bias_gradient's partial sums: (shares, 2, heads, length). More shares fill a GPU,
// fewer take less memory.
py::tuple bias_partial_shape(int64_t sequences, int64_t longest, int64_t heads) {
  constexpr int64_t kMostShares = 8, kMostBlocks = 256;  // of a head
  const int64_t diagonals = diagonals_of(longest);
  const int64_t shares =
      std::max<int64_t>(1, std::min({sequences, kMostShares, kMostBlocks / diagonals}));
  return py::make_tuple(shares, 2, heads, (diagonals + 1) * kTile);
}

// The gradient of the bias at each distance, before those beyond its reach are added to the last
// ones. line: (heads, length), the middle of a line has distance 0; partial: zeros, two lines for
// each share of the sequences. Called after the backward, which leaves statistics.
bool bias_gradient(py::handle dout, py::handle heads, py::handle sequences, py::handle scores,
                   py::handle dropout, py::handle statistics, py::handle partial, py::handle line) {
  const Members layout(sequences, 6, "sequences");
  const bool packed = !layout[1].is_none();
  Operands operands;
  const ThreeHeads in = ThreeHeads::read(operands, heads, packed, false);
  const HeadsView gradient(operands.tensor(dout, "dout"), packed);
  const Batch batch(operands, in.q, layout, scores, dropout);
  if (!batch.p.scores.bias) throw std::invalid_argument("there is no bias");
  AttentionBiasGradient p;
  p.batch = batch.p;
  p.batch.tiles = nullptr;
  p.statistics = reinterpret_cast<float2*>(
      operands.dense<float>(statistics, "statistics", 2 * batch.rows_of_heads()));
  const Tensor shares = operands.tensor(partial, "partial");
  const int64_t diagonals = diagonals_of(p.batch.length);
  const int64_t columns = batch.heads * (diagonals + 1) * kTile;
  p.shares = at_least_one(shares.dim() > 0 ? shares.size(0) : 0, "the number of shares");
  p.partial =
      static_cast<float*>(dense(shares, Element::kFloat32, 2 * int64_t(p.shares) * columns));
  p.diagonals = at_least_one(diagonals, "the number of diagonals");
  p.each = (p.batch.batch - 1) / p.shares + 1;
  at_least_one(p.shares * diagonals * batch.heads, "the number of blocks");
  ColumnSum sum{};
  sum.partial = p.partial;
  sum.out[0] = operands.dense<float>(line, "line", columns);
  sum.sums = 1;
  sum.n_partials = 2 * p.shares;
  sum.cols = at_least_one(columns, "the number of distances");
  if (!look_at_all(batch, in.q, in.k, in.v, gradient)) return false;
  p.dout = gradient.rows<const void>();
  p.q = in.q.rows<const void>();
  p.k = in.k.rows<const void>();
  p.v = in.v.rows<const void>();
  const OnDeviceOf guard(in.q.tensor);
  const Stream stream = in.q.tensor.stream();
  check(launch_attention_backward_bias(p, batch.dtype, stream),
        "launching attention's gradient of a bias");
  check(launch_column_sum(sum, DType::kFloat32, stream), "launching the sum of its parts");
  return true;
}

// Of one tensor of heads.
bool in_vectors(py::handle x) {
  const Tensor tensor(x, "x");
  return HeadsView(tensor, tensor.dim() == 3).in_vectors();
}

const Binding binding([](py::module_& m) {
  m.def("attention_forward", &forward, py::arg("heads"), py::arg("sequences"), py::arg("scores"),
        py::arg("dropout"), py::arg("out"), py::arg("lse"));
  m.def("attention_backward", &backward, py::arg("dout"), py::arg("heads"), py::arg("saved"),
        py::arg("sequences"), py::arg("scores"), py::arg("dropout"), py::arg("grads"),
        py::arg("statistics"));
  m.def("attention_rotate", &rotate, py::arg("heads"), py::arg("sequences"), py::arg("tables"),
        py::arg("rotated"));
  m.def("attention_backward_bias", &bias_gradient, py::arg("dout"), py::arg("heads"),
        py::arg("sequences"), py::arg("scores"), py::arg("dropout"), py::arg("statistics"),
        py::arg("partial"), py::arg("line"));
  m.def("attention_bias_partial_shape", &bias_partial_shape, py::arg("sequences"),
        py::arg("longest"), py::arg("heads"));
  m.def("attention_in_vectors", &in_vectors, py::arg("x"));
});

}  // namespace of_attention
}  // namespace bertfast
