#include "meshloom/plan/schedule.h"

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/plan/topics.h"
#include "meshloom/core/error.h"
#include "meshloom/plan/step_time.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using plan::Op;
using plan::Schedule;
using plan::StageAction;

Op parse_op(const std::string& name) {
  for (const Op op : {Op::kForward, Op::kBackward, Op::kWeightGradient}) {
    if (plan::to_string(op) == name) return op;
  }
  throw InvalidArgument("plan.schedule", "unknown computation \"" + name +
                                             "\"; known: forward, backward, weight_gradient");
}

/// Without a placement the pieces of the model go round the stages.
Schedule make_table(std::vector<std::vector<StageAction>> stages,
                    const std::vector<std::pair<int, int>>& placement) {
  Schedule table;
  table.stages = std::move(stages);
  for (const auto& [stage, chunk] : placement) table.placement.push_back({stage, chunk});
  if (!placement.empty()) return table;
  int chunks = 1;
  for (const auto& order : table.stages) {
    for (const auto& action : order) chunks = std::max(chunks, action.chunk + 1);
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    for (std::size_t stage = 0; stage < table.stages.size(); ++stage) {
      table.placement.push_back({static_cast<int>(stage), chunk});
    }
  }
  return table;
}

}  // namespace

void bind_schedule(py::module_& module) {
  py::class_<StageAction>(module, "StageAction", "One computation of a pipeline stage.")
      .def(py::init([](const std::string& op, int slot, int chunk, bool defer) {
             return StageAction{parse_op(op), chunk, slot, defer};
           }),
           py::arg("op"), py::arg("slot"), py::arg("chunk") = 0, py::kw_only(),
           py::arg("defer_weight_gradient") = false,
           "`op` is forward, backward or weight_gradient.")
      .def_property_readonly(
          "op", [](const StageAction& self) { return std::string(plan::to_string(self.op)); })
      .def_readwrite("slot", &StageAction::slot)
      .def_readwrite("chunk", &StageAction::chunk)
      .def_readwrite("defer_weight_gradient", &StageAction::defer_weight_gradient)
      .def("__repr__",
           [](const StageAction& self) {
             return py::str("StageAction({!r}, slot={}, chunk={})")
                 .format(std::string(plan::to_string(self.op)), self.slot, self.chunk);
           })
      .def(py::self == py::self);
  py::class_<Schedule, std::shared_ptr<Schedule>>(
      module, "Schedule", "Each pipeline stage's total order of computations over slots.")
      .def(py::init(&make_table), py::arg("stages"),
           py::arg("placement") = std::vector<std::pair<int, int>>{},
           "`stages` lists each stage's actions; `placement` the (stage, chunk) of the model's "
           "pieces in order, round the stages where it is not given.")
      .def_readwrite("stages", &Schedule::stages, "A copy; assign a list to change it.")
      .def_property_readonly("placement", [](const Schedule& self) {
        std::vector<std::pair<int, int>> places;
        for (const auto& place : self.placement) places.emplace_back(place.stage, place.chunk);
        return places;
      });
  module.def("schedule_names", &plan::schedule_names, "Built-in pipeline schedules.");
  module.def("make_schedule", &plan::make_schedule, py::arg("name"), py::arg("layout"),
             py::arg("slots"), "A built-in schedule as a table.");
  module.def("check_schedule", &plan::check_schedule, py::arg("schedule"), py::arg("layout"),
             py::arg("slots"), "Raises PlanError for a table that can't be carried out.");
  module.def("step_time",
             py::overload_cast<const plan::StepPlan&, const std::string&>(&plan::step_time),
             py::arg("plan"), py::arg("schedule") = std::string(),
             "Time of the plan's programs in the units of its cost model.");
}

}  // namespace meshloom::bindings
