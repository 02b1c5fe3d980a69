// A torch tensor as a call lends it: where its memory is, and how its elements lie there.
//
// A kernel reads memory as it is told. So whatever a kernel gets the address of is looked at here,
// and refused with an AssertionError where the memory isn't what the kernel takes it for: to make a
// tensor dense is the caller's affair, before.
#pragma once

#include <pybind11/pytypes.h>

#include <string>

#include "bindings/dlpack.h"
#include "params.h"

namespace bertfast {

namespace py = pybind11;

enum class Element { kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kBool, kOther };

template<class T>
constexpr Element element_of = Element::kOther;
template<>
inline constexpr Element element_of<float> = Element::kFloat32;
template<>
inline constexpr Element element_of<int32_t> = Element::kInt32;
template<>
inline constexpr Element element_of<int64_t> = Element::kInt64;
template<>
inline constexpr Element element_of<bool> = Element::kBool;

constexpr Element element(DType dtype) {
  return dtype == DType::kFloat32   ? Element::kFloat32
         : dtype == DType::kFloat16 ? Element::kFloat16
                                    : Element::kBFloat16;
}

class Tensor {
 public:
  // TypeError where the object isn't a tensor.
  Tensor(py::handle object, const char* name);

  const char* name() const { return name_; }
  int dim() const { return view_.ndim; }
  // Dimensions count from the end where they are negative.
  int64_t size(int dimension) const { return view_.shape[index(dimension)]; }
  // 0 of a size of 1, where a stride may be anything.
  int64_t stride(int dimension) const {
    const int i = index(dimension);
    return view_.shape[i] == 1 ? 0 : view_.strides[i];
  }
  int64_t numel() const;
  bool is_dense() const;
  Element element() const;
  DType dtype() const;  // of float32, float16 and bfloat16; refuses all others
  dlpack::Device device() const { return view_.device; }
  const dlpack::Tensor& view() const { return view_; }
  char* data() const { return static_cast<char*>(view_.data) + view_.byte_offset; }
  // Torch's current stream on the tensor's device.
  Stream stream() const;

  // Raises that a kernel reads the tensor as something that it isn't.
  [[noreturn]] void refuse(const std::string& as) const;

 private:
  int index(int dimension) const { return dimension < 0 ? view_.ndim + dimension : dimension; }

  const char* name_;
  const dlpack::ExchangeApi* api_;
  dlpack::Tensor view_;
};

const char* name_of(Element);

// The address of a dense tensor of `count` elements.
void* dense(const Tensor& tensor, Element element, int64_t count);

// Where rows begin, and how many elements apart.
struct Rows {
  char* data;
  int stride;
};

// A dense tensor of any shape, or a matrix of dense rows, as `count` rows of `width` elements.
Rows rows(const Tensor& tensor, Element element, int64_t count, int64_t width);

// The tensors of one call, which lie on one device: the first one's. None is null where a tensor
// may be left out.
class Operands {
 public:
  Tensor tensor(py::handle object, const char* name);
  void* dense(py::handle object, const char* name, DType dtype, int64_t count) {
    return bertfast::dense(tensor(object, name), element(dtype), count);
  }
  void* dense_or_none(py::handle object, const char* name, DType dtype, int64_t count) {
    return object.is_none() ? nullptr : dense(object, name, dtype, count);
  }
  template<class T>
  T* dense(py::handle object, const char* name, int64_t count) {
    return static_cast<T*>(bertfast::dense(tensor(object, name), element_of<T>, count));
  }
  template<class T>
  T* dense_or_none(py::handle object, const char* name, int64_t count) {
    return object.is_none() ? nullptr : dense<T>(object, name, count);
  }

  Rows rows(py::handle object, const char* name, DType dtype, int64_t count, int64_t width) {
    return bertfast::rows(tensor(object, name), element(dtype), count, width);
  }

 private:
  bool any_ = false;
  dlpack::Device device_{};
};

}  // namespace bertfast
