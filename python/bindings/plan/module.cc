#include <pybind11/pybind11.h>

#include "bindings/errors.h"
#include "bindings/plan/topics.h"
#include "meshloom/core/version.h"

PYBIND11_MODULE(_plan, module) {
  module.doc() = "Planning, verification and simulation; never loads LibTorch.";
  meshloom::bindings::register_errors(module);
  module.attr("__version__") = meshloom::kVersion;
  meshloom::bindings::bind_models(module);
  meshloom::bindings::bind_fit(module);
  meshloom::bindings::bind_step_plan(module);
  meshloom::bindings::bind_strategy(module);
  meshloom::bindings::bind_schedule(module);
  meshloom::bindings::bind_program(module);
  meshloom::bindings::bind_verifier(module);
  meshloom::bindings::bind_memory(module);
  meshloom::bindings::bind_simulator(module);
}
