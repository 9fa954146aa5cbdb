#include <pybind11/pybind11.h>

#include "bindings/core/bindings.h"
#include "bindings/errors.h"
#include "meshloom/core/environment.h"
#include "meshloom/core/version.h"
#include "meshloom/model/ops.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Communication, models, data and training; import torch first.";
  meshloom::bindings::register_errors(module);
  pybind11::module_::import("meshloom._plan");  // registers StepPlan, Layout, ...
  module.attr("__version__") = meshloom::kVersion;
  module.attr("torch_version") = meshloom::kLibTorchVersion;
  meshloom::model::ops::set_cpu_level(meshloom::Environment::from_process().cpu);
  meshloom::bindings::bind_comm(module);
  meshloom::bindings::bind_model(module);
  meshloom::bindings::bind_data(module);
  meshloom::bindings::bind_parallel(module);
  meshloom::bindings::bind_train(module);
}
