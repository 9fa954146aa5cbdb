#pragma once

#include <pybind11/pybind11.h>

namespace meshloom::bindings {

/// Makes every meshloom::Error that leaves a function of `module` the class of the same name in
/// `meshloom._errors` (one place for both extension modules). The instance has `where`, and
/// `location` as "file:line".
void register_errors(pybind11::module_& module);

}  // namespace meshloom::bindings
