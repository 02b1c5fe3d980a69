// Python's view of the kernels: integers in, launches out. The only file that knows Python.
//
// Pointers, the stream and dtype tags arrive as integers, so the module needs no torch to build or
// to import, and a call costs a fraction of a microsecond. The Python side has checked shapes and
// dtypes; here only what memory safety needs is checked again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "params.h"

#ifdef BERTFAST_HOST
#include "device/philox.cuh"
#include "host/control.h"
#endif

namespace py = pybind11;

namespace bertfast {
namespace {

using Pointer = uintptr_t;

template<class T = void>
T* as(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
  }
}

int to_int(int64_t value, const char* name) {
  if (value < 0 || value > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(std::string(name) + " must be between 0 and 2**31 - 1, got " +
                                std::to_string(value));
  }
  return static_cast<int>(value);
}

int columns(int64_t cols) {
  if (cols < 1 || cols > 8192) {
    throw std::invalid_argument("cols must be between 1 and 8192, got " + std::to_string(cols));
  }
  return static_cast<int>(cols);
}

int at_least_one(int64_t value, const char* name) {
  if (value < 1) throw std::invalid_argument(std::string(name) + " must be 1 or more");
  return to_int(value, name);
}

DType dtype_of(int tag) {
  if (tag < 0 || tag > 2) throw std::invalid_argument("dtype must be 0, 1 or 2");
  return static_cast<DType>(tag);
}

// Makes the tensors' device the current one while a launch lasts.
class OnDevice {
 public:
#ifdef BERTFAST_HOST
  explicit OnDevice(int) {}
#else
  explicit OnDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = device != previous_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
#endif
};

void layer_norm_forward(Pointer x, Pointer residual, Pointer x_bias, Pointer weight, Pointer bias,
                        Pointer seed, Pointer row_index, Pointer y, Pointer z, Pointer mean,
                        Pointer rstd, int64_t rows, int64_t x_row_stride,
                        int64_t residual_row_stride, int64_t cols, float eps, float keep_scale,
                        uint32_t threshold, uint32_t site, int x_dtype, int dtype, int device,
                        Pointer stream) {
  LayerNormForward p;
  p.x = as(x);
  p.residual = as(residual);
  p.x_bias = as(x_bias);
  p.weight = as(weight);
  p.bias = as(bias);
  p.seed = as<const int64_t>(seed);
  p.row_index = as<const int64_t>(row_index);
  p.y = as(y);
  p.z = as(z);
  p.mean = as<float>(mean);
  p.rstd = as<float>(rstd);
  p.rows = at_least_one(rows, "rows");
  p.x_row_stride = to_int(x_row_stride, "x's row stride");
  p.residual_row_stride = to_int(residual_row_stride, "residual's row stride");
  p.cols = columns(cols);
  p.inv_cols = 1.f / static_cast<float>(cols);
  p.eps = eps;
  p.keep_scale = keep_scale;
  p.threshold = threshold;
  p.site = site;
  OnDevice guard(device);
  check(launch_layer_norm_forward(p, dtype_of(x_dtype), dtype_of(dtype),
                                  reinterpret_cast<Stream>(stream)),
        "launching layer_norm's forward");
}

void layer_norm_backward(Pointer dy, Pointer z, Pointer mean, Pointer rstd, Pointer weight,
                         Pointer seed, Pointer row_index, Pointer dz, Pointer dx,
                         Pointer partial_dweight, Pointer partial_dbias, Pointer partial_dx_bias,
                         int64_t rows, int64_t dy_row_stride, int64_t z_row_stride, int64_t cols,
                         int64_t blocks, float keep_scale, uint32_t threshold, uint32_t site,
                         int x_dtype, int dtype, int device, Pointer stream) {
  LayerNormBackward p;
  p.dy = as(dy);
  p.z = as(z);
  p.mean = as<const float>(mean);
  p.rstd = as<const float>(rstd);
  p.weight = as(weight);
  p.seed = as<const int64_t>(seed);
  p.row_index = as<const int64_t>(row_index);
  p.dz = as(dz);
  p.dx = as(dx);
  p.partial_dweight = as<float>(partial_dweight);
  p.partial_dbias = as<float>(partial_dbias);
  p.partial_dx_bias = as<float>(partial_dx_bias);
  p.rows = at_least_one(rows, "rows");
  p.dy_row_stride = to_int(dy_row_stride, "dy's row stride");
  p.z_row_stride = to_int(z_row_stride, "z's row stride");
  p.cols = columns(cols);
  p.inv_cols = 1.f / static_cast<float>(cols);
  p.blocks = at_least_one(blocks, "blocks");
  p.keep_scale = keep_scale;
  p.threshold = threshold;
  p.site = site;
  OnDevice guard(device);
  check(launch_layer_norm_backward(p, dtype_of(x_dtype), dtype_of(dtype),
                                   reinterpret_cast<Stream>(stream)),
        "launching layer_norm's backward");
}

void bias_gelu_forward(Pointer x, Pointer bias, Pointer y, int64_t rows, int64_t x_row_stride,
                       int64_t cols, bool tanh, int x_dtype, int dtype, int device,
                       Pointer stream) {
  BiasGeluForward p;
  p.x = as(x);
  p.bias = as(bias);
  p.y = as(y);
  p.rows = at_least_one(rows, "rows");
  p.x_row_stride = to_int(x_row_stride, "x's row stride");
  p.cols = at_least_one(cols, "cols");
  OnDevice guard(device);
  check(launch_bias_gelu_forward(p, tanh, dtype_of(x_dtype), dtype_of(dtype),
                                 reinterpret_cast<Stream>(stream)),
        "launching bias_gelu's forward");
}

void bias_gelu_backward(Pointer dy, Pointer x, Pointer bias, Pointer dx, Pointer partial_dbias,
                        int64_t rows, int64_t dy_row_stride, int64_t x_row_stride, int64_t cols,
                        int64_t chains, bool tanh, int x_dtype, int dtype, int device,
                        Pointer stream) {
  BiasGeluBackward p;
  p.dy = as(dy);
  p.x = as(x);
  p.bias = as(bias);
  p.dx = as(dx);
  p.partial_dbias = as<float>(partial_dbias);
  p.rows = at_least_one(rows, "rows");
  p.dy_row_stride = to_int(dy_row_stride, "dy's row stride");
  p.x_row_stride = to_int(x_row_stride, "x's row stride");
  p.cols = at_least_one(cols, "cols");
  p.chains = at_least_one(chains, "chains");
  OnDevice guard(device);
  check(launch_bias_gelu_backward(p, tanh, dtype_of(x_dtype), dtype_of(dtype),
                                  reinterpret_cast<Stream>(stream)),
        "launching bias_gelu's backward");
}

void column_sum(Pointer partial, Pointer out0, Pointer out1, Pointer out2, int64_t sums,
                int64_t n_partials, int64_t cols, int dtype, int device, Pointer stream) {
  if (sums < 1 || sums > 3) throw std::invalid_argument("sums must be 1, 2 or 3");
  ColumnSum p;
  p.partial = as<const float>(partial);
  p.out[0] = as(out0);
  p.out[1] = as(out1);
  p.out[2] = as(out2);
  p.sums = static_cast<int>(sums);
  p.n_partials = at_least_one(n_partials, "n_partials");
  p.cols = at_least_one(cols, "cols");
  OnDevice guard(device);
  check(launch_column_sum(p, dtype_of(dtype), reinterpret_cast<Stream>(stream)),
        "launching column_sum");
}

// (address, strides of batch, token and head) of a tensor of head rows.
using HeadRowsTuple = std::tuple<Pointer, int64_t, int64_t, int64_t>;

template<class Void>
HeadRows<Void> head_rows(const HeadRowsTuple& x, const char* name) {
  const auto [data, batch, token, head] = x;
  if (data % 16 != 0 || batch % 8 != 0 || token % 8 != 0 || head % 8 != 0) {
    throw std::invalid_argument(std::string(name) +
                                " must be aligned to 16 bytes, its strides multiples of 8");
  }
  if (token < 0 || token >= 1 << 23) {
    throw std::invalid_argument(std::string(name) + "'s token stride must be below 2**23");
  }
  return {as(data), batch, head, static_cast<int>(token)};
}

// (key_mask, its row stride), (cu_seqlens, tiles, entries of tiles, rows of one), (seed,
// keep_scale, threshold, site), (strides of batch and head of lse), (batch, length, heads,
// head_dim).
using MaskTuple = std::tuple<Pointer, int64_t>;
using PackedTuple = std::tuple<Pointer, Pointer, int64_t, int>;
using DropoutTuple = std::tuple<Pointer, float, uint32_t, uint32_t>;
using StatisticsTuple = std::tuple<int64_t, int64_t>;
using SizesTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// The shared memory of a block holds a bit for each key of a masked row, beside its tiles.
constexpr int64_t kMostMaskedKeys = 1 << 17;

AttentionBatch attention_batch(MaskTuple mask, PackedTuple packed, DropoutTuple dropout,
                               StatisticsTuple statistics, SizesTuple sizes, float scale) {
  AttentionBatch p{};
  p.key_mask = as<const uint8_t>(std::get<0>(mask));
  p.mask_batch = std::get<1>(mask);
  p.cu_seqlens = as<const int32_t>(std::get<0>(packed));
  p.tiles = as<const int32_t>(std::get<1>(packed));
  p.plan_size = to_int(std::get<2>(packed), "the plan's size");
  p.tile = p.tiles ? std::get<3>(packed) : 64;
  p.seed = as<const int64_t>(std::get<0>(dropout));
  p.keep_scale = std::get<1>(dropout);
  p.threshold = std::get<2>(dropout);
  p.site = std::get<3>(dropout);
  p.lse_batch = std::get<0>(statistics);
  p.lse_head = std::get<1>(statistics);
  p.batch = at_least_one(std::get<0>(sizes), "batch");
  p.length = at_least_one(std::get<1>(sizes), "length");
  p.heads = at_least_one(std::get<2>(sizes), "heads");
  p.head_dim = to_int(std::get<3>(sizes), "head_dim");
  p.scale = scale;
  if (p.head_dim < 8 || p.head_dim > 128 || p.head_dim % 8 != 0) {
    throw std::invalid_argument("head_dim must be a multiple of 8 from 8 to 128, got " +
                                std::to_string(p.head_dim));
  }
  if (p.threshold > 65535) throw std::invalid_argument("threshold must be at most 65535");
  if (p.tile != 32 && p.tile != 64) throw std::invalid_argument("a plan's tile must be 32 or 64");
  if (p.tiles && !p.cu_seqlens) throw std::invalid_argument("a plan needs cu_seqlens");
  if (p.key_mask && p.cu_seqlens) throw std::invalid_argument("a packed batch has no key_mask");
  if (p.key_mask && p.length > kMostMaskedKeys) {
    throw std::invalid_argument("a sequence with a key_mask has at most 2**17 tokens, got " +
                                std::to_string(p.length));
  }
  const int64_t tiles = p.tiles ? p.plan_size : (p.length / 64 + 2) * int64_t(p.batch);
  if (tiles * p.heads > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("batch * heads * length / 64 must stay below 2**31");
  }
  return p;
}

DType dtype_of_16_bits(int tag) {
  const DType dtype = dtype_of(tag);
  if (dtype == DType::kFloat32) throw std::invalid_argument("dtype must be 1 or 2");
  return dtype;
}

void attention_forward(HeadRowsTuple q, HeadRowsTuple k, HeadRowsTuple v, HeadRowsTuple out,
                       Pointer lse, MaskTuple mask, PackedTuple packed, DropoutTuple dropout,
                       StatisticsTuple statistics, SizesTuple sizes, float scale, int dtype,
                       int device, Pointer stream) {
  AttentionForward p;
  p.batch = attention_batch(mask, packed, dropout, statistics, sizes, scale);
  p.q = head_rows<const void>(q, "q");
  p.k = head_rows<const void>(k, "k");
  p.v = head_rows<const void>(v, "v");
  p.out = head_rows<void>(out, "out");
  p.lse = as<float>(lse);
  OnDevice guard(device);
  check(launch_attention_forward(p, dtype_of_16_bits(dtype), reinterpret_cast<Stream>(stream)),
        "launching attention's forward");
}

void attention_backward(HeadRowsTuple dout, HeadRowsTuple q, HeadRowsTuple k, HeadRowsTuple v,
                        HeadRowsTuple out, Pointer lse, Pointer row_statistics, HeadRowsTuple dq,
                        HeadRowsTuple dk, HeadRowsTuple dv, MaskTuple mask, PackedTuple packed,
                        DropoutTuple dropout, StatisticsTuple statistics, SizesTuple sizes,
                        float scale, int dtype, int device, Pointer stream) {
  AttentionBackward p;
  p.batch = attention_batch(mask, packed, dropout, statistics, sizes, scale);
  p.dout = head_rows<const void>(dout, "dout");
  p.q = head_rows<const void>(q, "q");
  p.k = head_rows<const void>(k, "k");
  p.v = head_rows<const void>(v, "v");
  p.out = head_rows<const void>(out, "out");
  p.lse = as<const float>(lse);
  p.statistics = as<float2>(row_statistics);
  p.dq = head_rows<void>(dq, "dq");
  p.dk = head_rows<void>(dk, "dk");
  p.dv = head_rows<void>(dv, "dv");
  OnDevice guard(device);
  check(launch_attention_backward(p, dtype_of_16_bits(dtype), reinterpret_cast<Stream>(stream)),
        "launching attention's backward");
}

#ifdef BERTFAST_HOST

void bind_host(py::module_& m) {
  m.def("set_schedule", &host::set_schedule, py::arg("name"), py::arg("seed") = 0);
  m.def("set_perturb", &host::set_perturb, py::arg("on"), py::arg("seed") = 0);
  m.def("set_dry_launch", &host::set_dry_launch);
  m.def("reset_records", &host::reset_records);
  m.def("bank_conflicts", [] {
    py::list list;
    for (const auto& record : host::bank_conflicts()) {
      list.append(py::make_tuple(record.site, record.worst_degree, record.accesses));
    }
    return list;
  });
  // The generator itself, so that a test can hold it to Philox's published vectors.
  m.def("philox10",
        [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
          const uint4 words = philox<10>(make_uint4(c0, c1, c2, c3), make_uint2(k0, k1));
          return py::make_tuple(words.x, words.y, words.z, words.w);
        });
}

#else

void bind_host(py::module_&) {}

#endif

}  // namespace
}  // namespace bertfast

PYBIND11_MODULE(BERTFAST_MODULE, m) {
  using namespace bertfast;
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("layer_norm_rows_per_block", [](int64_t cols, int dtype) {
    return layer_norm_rows_per_block(columns(cols), dtype_of(dtype));
  });
  m.def("bias_gelu_forward", &bias_gelu_forward);
  m.def("bias_gelu_backward", &bias_gelu_backward);
  m.def("column_sum", &column_sum);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  bind_host(m);
}
