// The Python module `cuda_executor`: operators' device code, on tensors given by address.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "jacobian_match.h"
#include "window_crop.h"

PYBIND11_MODULE(cuda_executor, m) {
  pybind11::register_exception<executor::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("jacobian_match", &run_jacobian_match);
  m.def("window_crop", &run_window_crop);
}
