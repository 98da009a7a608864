// The Python module `cuda_executor`: operators' device code, on tensors given by address.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention_window.h"
#include "jacobian_match.h"
#include "norm_act_pool.h"
#include "window_crop.h"

PYBIND11_MODULE(cuda_executor, m) {
  pybind11::register_exception<executor::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("take_launched", &executor::take_launched);
  m.def("attention_window", &run_attention_window);
  m.def("attention_window_slope", &run_attention_window_slope);
  m.def("jacobian_match", &run_jacobian_match);
  m.def("window_crop", &run_window_crop);
  m.def(
      "norm_act_pool", [](std::string op, std::string dtype, std::vector<int64_t> shape,
                          bool channels_last, int activation, double slope, std::vector<int> pool,
                          bool flag, std::map<std::string, uintptr_t> tensors, uint64_t seed) {
        return run_norm_act_pool(
            {op, dtype, shape, channels_last, activation, slope, pool, flag, tensors, seed}
        );
      }
  );
}
