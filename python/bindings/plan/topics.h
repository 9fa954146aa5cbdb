#pragma once

#include <pybind11/pybind11.h>

/// One function a source file; called once by the module.
namespace meshloom::bindings {

void bind_models(pybind11::module_& module);     ///< layout, cost and memory models
void bind_fit(pybind11::module_& module);        ///< cost models from timings
void bind_step_plan(pybind11::module_& module);  ///< samples, units, plans, per-rank lists
void bind_strategy(pybind11::module_& module);   ///< problems, strategies, their registry
void bind_program(pybind11::module_& module);    ///< instructions, programs, compile
void bind_schedule(pybind11::module_& module);   ///< pipeline schedules as tables
void bind_verifier(pybind11::module_& module);
void bind_memory(pybind11::module_& module);     ///< memory forecasts
void bind_simulator(pybind11::module_& module);  ///< clusters, workloads, simulations

}  // namespace meshloom::bindings
