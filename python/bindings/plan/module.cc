#include <pybind11/pybind11.h>

#include "bindings/errors.h"
#include "meshloom/core/version.h"

PYBIND11_MODULE(_plan, module) {
  module.doc() = "Planning, verification and simulation; never loads LibTorch.";
  meshloom::bindings::register_errors(module);
  module.attr("__version__") = meshloom::kVersion;
}
