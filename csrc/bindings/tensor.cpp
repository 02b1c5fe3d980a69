#include "bindings/tensor.h"

#include <limits>
#include <vector>

namespace bertfast {
namespace {

// The table that a class of tensors carries; null where it has none that can be read.
const dlpack::ExchangeApi* find_api(PyTypeObject* type) {
  const py::handle class_(reinterpret_cast<PyObject*>(type));
  const py::object capsule = py::getattr(class_, dlpack::kAttribute, py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
  auto* header =
      static_cast<const dlpack::Header*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  while (header && header->major != dlpack::kMajorVersion) header = header->previous;
  auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api && api->tensor_from_py_object_no_sync ? api : nullptr;
}

// The same, looked up once a class. Classes that have been seen are kept, lest another one comes to
// lie at a lost one's address.
const dlpack::ExchangeApi* api_of(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static std::vector<Known>* known = new std::vector<Known>();
  for (const Known& one : *known) {
    if (one.type == type) return one.api;
  }
  const dlpack::ExchangeApi* api = find_api(type);
  if (api) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));
    known->push_back({type, api});
  }
  return api;
}

std::string list(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

}  // namespace

const char* name_of(Element element) {
  switch (element) {
    case Element::kFloat32:
      return "float32";
    case Element::kFloat16:
      return "float16";
    case Element::kBFloat16:
      return "bfloat16";
    case Element::kInt32:
      return "int32";
    case Element::kInt64:
      return "int64";
    case Element::kBool:
      return "bool";
    default:
      return "of another dtype";
  }
}

Tensor::Tensor(py::handle object, const char* name)
    : name_(name), api_(api_of(Py_TYPE(object.ptr()))) {
  if (!api_) {
    throw py::type_error(std::string(name) + " must be a tensor of torch 2.10 or later, got " +
                         Py_TYPE(object.ptr())->tp_name);
  }
  if (api_->tensor_from_py_object_no_sync(object.ptr(), &view_) != 0) throw py::error_already_set();
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int i = 0; i < view_.ndim; ++i) count *= view_.shape[i];
  return count;
}

bool Tensor::is_dense() const {
  int64_t step = 1;
  for (int i = view_.ndim - 1; i >= 0; --i) {
    if (view_.shape[i] == 1) continue;
    if (view_.strides[i] != step) return numel() == 0;
    step *= view_.shape[i];
  }
  return true;
}

Element Tensor::element() const {
  const dlpack::DataType type = view_.dtype;
  if (type.lanes != 1) return Element::kOther;
  switch (type.code << 8 | type.bits) {
    case dlpack::kFloat << 8 | 32:
      return Element::kFloat32;
    case dlpack::kFloat << 8 | 16:
      return Element::kFloat16;
    case dlpack::kBFloat << 8 | 16:
      return Element::kBFloat16;
    case dlpack::kInt << 8 | 32:
      return Element::kInt32;
    case dlpack::kInt << 8 | 64:
      return Element::kInt64;
    case dlpack::kBool << 8 | 8:
      return Element::kBool;
    default:
      return Element::kOther;
  }
}

DType Tensor::dtype() const {
  switch (element()) {
    case Element::kFloat32:
      return DType::kFloat32;
    case Element::kFloat16:
      return DType::kFloat16;
    case Element::kBFloat16:
      return DType::kBFloat16;
    default:
      refuse("float32, float16 or bfloat16");
  }
}

Stream Tensor::stream() const {
#ifdef BERTFAST_HOST
  return nullptr;
#else
  void* stream = nullptr;
  if (api_->current_work_stream(dlpack::kCUDA, view_.device.index, &stream) != 0) {
    throw py::error_already_set();
  }
  return static_cast<Stream>(stream);
#endif
}

void Tensor::refuse(const std::string& as) const {
  const std::string text = std::string("a kernel reads ") + name_ + " as " + as + "; it is " +
                           name_of(element()) + " with shape " + list(view_.shape, view_.ndim) +
                           " and strides " + list(view_.strides, view_.ndim);
  py::set_error(PyExc_AssertionError, text.c_str());
  throw py::error_already_set();
}

void* dense(const Tensor& tensor, Element element, int64_t count) {
  if (tensor.element() != element || tensor.numel() != count || !tensor.is_dense()) {
    tensor.refuse(std::to_string(count) + " dense elements of " + name_of(element));
  }
  return tensor.data();
}

Rows rows(const Tensor& tensor, Element element, int64_t count, int64_t width) {
  const bool dense = tensor.is_dense();
  const bool matrix =
      tensor.dim() == 2 && tensor.size(1) == width && (tensor.stride(1) == 1 || width == 1);
  if (tensor.element() != element || tensor.numel() != count * width || !(dense || matrix)) {
    tensor.refuse(std::to_string(count) + " dense rows of " + std::to_string(width) +
                  " elements of " + name_of(element));
  }
  const int64_t stride = dense ? width : tensor.stride(0);
  if (stride > std::numeric_limits<int>::max())
    tensor.refuse("rows fewer than 2**31 elements apart");
  return {tensor.data(), static_cast<int>(stride)};
}

Tensor Operands::tensor(py::handle object, const char* name) {
  const Tensor tensor(object, name);
  const dlpack::Device device = tensor.device();
  if (!any_) {
#ifdef BERTFAST_HOST
    if (device.type != dlpack::kCPU) tensor.refuse("memory of the CPU");
#else
    if (device.type != dlpack::kCUDA) tensor.refuse("memory of a CUDA device");
#endif
    any_ = true;
    device_ = device;
  } else if (device.type != device_.type || device.index != device_.index) {
    tensor.refuse("memory of the device that the call's other tensors lie on");
  }
  return tensor;
}

}  // namespace bertfast
