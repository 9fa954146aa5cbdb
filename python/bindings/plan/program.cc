#include "meshloom/plan/program.h"

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>

#include "bindings/plan/topics.h"
#include "meshloom/plan/schedule.h"

namespace meshloom::bindings {

namespace py = pybind11;

void bind_program(py::module_& module) {
  using plan::CompileOptions;
  using plan::Instruction;
  using plan::Program;
  using plan::Rendezvous;
  py::class_<Rendezvous>(module, "Rendezvous", "What meets inside an instruction.")
      .def_property_readonly(
          "kind", [](const Rendezvous& self) { return std::string(plan::to_string(self.kind)); })
      .def_property(
          "ranks", [](const Rendezvous& self) { return self.ranks.values(); },
          [](Rendezvous& self, std::vector<int> ranks) { self.ranks = std::move(ranks); })
      .def_readwrite("count", &Rendezvous::count)
      .def(py::self == py::self);
  py::class_<Instruction>(module, "Instruction", "A micro-batch on a pipeline stage.")
      .def_property_readonly(
          "op", [](const Instruction& self) { return std::string(plan::to_string(self.op)); })
      .def_readwrite("slot", &Instruction::slot)
      .def_readwrite("unit", &Instruction::unit)
      .def_readwrite("chunk", &Instruction::chunk)
      .def_readwrite("peer", &Instruction::peer)
      .def_readwrite("gradient", &Instruction::gradient)
      .def_readwrite("defer_weight_gradient", &Instruction::defer_weight_gradient)
      .def_readwrite("rendezvous", &Instruction::rendezvous, "A copy; assign a list to change it.")
      .def(py::self == py::self);
  py::class_<Program>(module, "Program", "How one rank carries out one step.")
      .def_readwrite("step", &Program::step)
      .def_readwrite("rank", &Program::rank)
      .def_readwrite("instructions", &Program::instructions, "A copy; assign a list to change it.")
      .def(py::self == py::self);
  module.def(
      "compile",
      [](const plan::StepPlan& step_plan, int layers, const std::string& schedule,
         std::shared_ptr<const plan::Schedule> table) {
        const CompileOptions options{
            .layers = layers, .schedule = schedule, .table = std::move(table)};
        const py::gil_scoped_release release;
        return plan::compile(step_plan, options);
      },
      py::arg("plan"), py::kw_only(), py::arg("layers") = CompileOptions{}.layers,
      py::arg("schedule") = CompileOptions{}.schedule, py::arg("table") = py::none(),
      "Programs of all ranks, in rank order. `table` is a pipeline schedule of one's own.");
  module.def(
      "compile_rank",
      [](const plan::StepPlan& step_plan, int rank, int layers, const std::string& schedule,
         std::shared_ptr<const plan::Schedule> table) {
        const CompileOptions options{
            .layers = layers, .schedule = schedule, .table = std::move(table)};
        const py::gil_scoped_release release;
        return plan::compile_rank(step_plan, options, rank);
      },
      py::arg("plan"), py::arg("rank"), py::kw_only(), py::arg("layers") = CompileOptions{}.layers,
      py::arg("schedule") = CompileOptions{}.schedule, py::arg("table") = py::none());
}

}  // namespace meshloom::bindings
