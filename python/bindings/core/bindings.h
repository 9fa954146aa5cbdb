#pragma once

#include <pybind11/pybind11.h>

namespace meshloom::bindings {

void bind_comm(pybind11::module_& module);
void bind_model(pybind11::module_& module);
void bind_data(pybind11::module_& module);
void bind_parallel(pybind11::module_& module);
void bind_train(pybind11::module_& module);

}  // namespace meshloom::bindings
