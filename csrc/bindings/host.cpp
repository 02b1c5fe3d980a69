// How tests set what runs kernels on a CPU, and read what it recorded. Of the host build alone.
#ifdef BERTFAST_HOST

#include "bindings/module.h"
#include "device/philox.cuh"
#include "host/control.h"

namespace bertfast {
namespace of_host {

namespace py = pybind11;

py::list bank_conflicts() {
  py::list list;
  for (const auto& record : host::bank_conflicts()) {
    list.append(py::make_tuple(record.site, record.worst_degree, record.accesses));
  }
  return list;
}

// The generator itself, so that a test can hold it to Philox's published vectors.
py::tuple philox10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const uint4 words = philox<10>(make_uint4(c0, c1, c2, c3), make_uint2(k0, k1));
  return py::make_tuple(words.x, words.y, words.z, words.w);
}

const Binding binding([](py::module_& m) {
  m.def("set_schedule", &host::set_schedule, py::arg("name"), py::arg("seed") = 0);
  m.def("set_perturb", &host::set_perturb, py::arg("on"), py::arg("seed") = 0);
  m.def("set_dry_launch", &host::set_dry_launch, py::arg("on"));
  m.def("set_gpu", &host::set_gpu, py::arg("capability"), py::arg("multiprocessors") = 2);
  m.def("set_first_block", &host::set_first_block, py::arg("number"));
  m.def("leave_out", &host::leave_out, py::arg("file"), py::arg("line"));
  m.def("reset_records", &host::reset_records);
  m.def("launch_count", &host::launch_count);
  m.def("bank_conflicts", &bank_conflicts);
  m.def("philox10", &philox10);
});

}  // namespace of_host
}  // namespace bertfast

#endif
