// Whether this machine's driver can load the kernels for a device: bertfast/ops/native.py. Of the
// GPUs' module alone.
#ifndef BERTFAST_HOST

#include "bindings/module.h"
#include "params.h"

namespace bertfast {
namespace of_probe {

namespace py = pybind11;

// CUDA's name of the error, or None; the newest CUDA that the driver serves; the module's own.
py::tuple probe(int device) {
  int driver = 0, runtime = 0, before = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = load_a_kernel();
    cudaSetDevice(before);
  }
  cudaGetLastError();  // it is told here, and not to the next launch
  py::object name = py::none();
  if (error != cudaSuccess) name = py::str(cudaGetErrorName(error));
  return py::make_tuple(name, driver, runtime);
}

const Binding binding([](py::module_& m) { m.def("probe", &probe, py::arg("device")); });

}  // namespace of_probe
}  // namespace bertfast

#endif
