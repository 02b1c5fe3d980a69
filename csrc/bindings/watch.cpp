// What a model's call compares before it may take what it found at an earlier call for true: that
// nothing about the modules changed, and that parameters lie where they did. Python's form of each
// is in bertfast/nn/watching.py; here the comparisons of a layer take well under a microsecond.
//
// The lists belong to the caller. Nothing is kept, so that no reference keeps a model alive.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "bindings/module.h"
#include "bindings/tensor.h"

namespace bertfast {
namespace of_watch {

namespace py = pybind11;

// An item of a list, as a dict. Hooks lie in an OrderedDict, which is one.
PyObject* dict_of(const py::list& list, Py_ssize_t i) {
  PyObject* item = PyList_GET_ITEM(list.ptr(), i);
  if (!PyDict_Check(item)) throw py::type_error("a list of dicts was expected");
  return item;
}

void check_sizes(const py::list& one, const py::list& other) {
  if (one.size() != other.size()) throw py::value_error("lists of one length were expected");
}

// Whether these are modules of exactly these classes.
bool of_kinds(const py::list& modules, const py::list& kinds) {
  check_sizes(modules, kinds);
  for (size_t i = 0; i < modules.size(); ++i) {
    PyObject* module = PyList_GET_ITEM(modules.ptr(), i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyList_GET_ITEM(kinds.ptr(), i)) {
      return false;
    }
  }
  return true;
}

bool all_empty(const py::list& dicts) {
  for (size_t i = 0; i < dicts.size(); ++i) {
    if (PyDict_Size(dict_of(dicts, i)) != 0) return false;
  }
  return true;
}

// Whether none of the dicts has the key.
bool none_has(const py::list& dicts, const py::str& key) {
  for (size_t i = 0; i < dicts.size(); ++i) {
    const int found = PyDict_Contains(dict_of(dicts, i), key.ptr());
    if (found < 0) throw py::error_already_set();
    if (found) return false;
  }
  return true;
}

// Whether the dicts hold these very objects under these names.
bool holds(const py::list& dicts, const py::list& names, const py::list& objects) {
  check_sizes(dicts, names);
  check_sizes(dicts, objects);
  for (size_t i = 0; i < dicts.size(); ++i) {
    PyObject* found = PyDict_GetItemWithError(dict_of(dicts, i), PyList_GET_ITEM(names.ptr(), i));
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    if (found != PyList_GET_ITEM(objects.ptr(), i)) return false;
  }
  return true;
}

bool of_sizes(const py::list& dicts, const py::list& sizes) {
  check_sizes(dicts, sizes);
  for (size_t i = 0; i < dicts.size(); ++i) {
    if (PyDict_Size(dict_of(dicts, i)) != PyLong_AsSsize_t(PyList_GET_ITEM(sizes.ptr(), i))) {
      return false;
    }
  }
  return true;
}

// Addresses and forms of tensors, to be compared as a whole.
py::bytes memory_of(const py::list& tensors) {
  std::string all;
  all.reserve(64 * tensors.size());
  const auto add = [&all](const void* from, size_t size) {
    all.append(static_cast<const char*>(from), size);
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor tensor(PyList_GET_ITEM(tensors.ptr(), i), "parameter");
    const dlpack::Tensor& view = tensor.view();
    const char* data = tensor.data();
    add(&data, sizeof data);
    add(&view.device, sizeof view.device);
    add(&view.dtype, sizeof view.dtype);
    add(&view.ndim, sizeof view.ndim);
    add(view.shape, view.ndim * sizeof *view.shape);
    add(view.strides, view.ndim * sizeof *view.strides);
  }
  return py::bytes(all);
}

const Binding binding([](py::module_& m) {
  m.def("of_kinds", &of_kinds);
  m.def("all_empty", &all_empty);
  m.def("none_has", &none_has);
  m.def("holds", &holds);
  m.def("of_sizes", &of_sizes);
  m.def("memory_of", &memory_of);
});

}  // namespace of_watch
}  // namespace bertfast
