#include "meshloom/plan/verifier.h"

#include <pybind11/stl.h>

#include <vector>

#include "bindings/plan/topics.h"

namespace meshloom::bindings {

namespace py = pybind11;

void bind_verifier(py::module_& module) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  using plan::Program;
  using plan::StepPlan;
  using plan::Violation;
  py::class_<Violation>(module, "Violation", "One broken contract.")
      .def_readonly("contract", &Violation::contract)
      .def_readonly("message", &Violation::message)
      .def("__str__", [](const Violation& v) { return v.contract + ": " + v.message; })
      .def("__repr__", [](const Violation& v) { return v.contract + ": " + v.message; });
  module.def("check_plan", &plan::check_plan, py::arg("plan"), NoGil(),
             "All violations of the plan's contracts; empty: it is valid.");
  module.def("check_programs", &plan::check_programs, py::arg("plan"), py::arg("programs"), NoGil(),
             "All violations of all ranks' programs together.");
  module.def("check_memory", &plan::check_memory, py::arg("plan"), py::arg("programs"),
             py::arg("most_tokens"), NoGil(),
             "Where a rank keeps activations of more than so many tokens of all layers at a time.");
  module.def("verify", py::overload_cast<const StepPlan&>(&plan::verify), py::arg("plan"), NoGil(),
             "Raises PlanError naming the first violation and how many more there are.");
  module.def("verify",
             py::overload_cast<const StepPlan&, const std::vector<Program>&>(&plan::verify),
             py::arg("plan"), py::arg("programs"), NoGil());
}

}  // namespace meshloom::bindings
