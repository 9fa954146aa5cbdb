#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings/plan/topics.h"
#include "meshloom/plan/rank_plan.h"
#include "meshloom/plan/slicing.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using plan::StepPlan;
using plan::Unit;
using NoGil = py::call_guard<py::gil_scoped_release>;

/// Names of enumerations are plain strings in Python.
py::object checked_exchange(const std::string& name) {
  return py::str(std::string(plan::to_string(plan::parse_exchange(name))));
}
py::object checked_lockstep(const std::string& name) {
  return py::str(std::string(plan::to_string(plan::parse_lockstep(name))));
}

std::string repr(const Unit& unit) {
  return py::str("Unit(ranks={}, samples={}, exchange={!r}, offload={})")
      .format(py::cast(unit.ranks), py::cast(unit.samples),
              std::string(plan::to_string(unit.exchange)), unit.offload)
      .cast<std::string>();
}

void bind_units(py::module_& module) {
  py::class_<plan::SampleInfo>(module, "SampleInfo", "Metadata of one training document.")
      .def(py::init([](std::int64_t id, std::int64_t tokens, std::optional<std::int64_t> loss) {
             return plan::SampleInfo{id, tokens, loss.value_or(tokens > 0 ? tokens - 1 : 0)};
           }),
           py::arg("id"), py::arg("tokens"), py::arg("loss_tokens") = py::none())
      .def_readwrite("id", &plan::SampleInfo::id)
      .def_readwrite("tokens", &plan::SampleInfo::tokens)
      .def_readwrite("loss_tokens", &plan::SampleInfo::loss_tokens)
      .def("__repr__",
           [](const plan::SampleInfo& s) {
             return py::str("SampleInfo(id={}, tokens={}, loss_tokens={})")
                 .format(s.id, s.tokens, s.loss_tokens);
           })
      .def(py::self == py::self);
  py::class_<Unit>(module, "Unit",
                   "HDP ranks, in ring order, and the samples they process together.")
      .def(py::init([](std::vector<int> ranks, std::vector<std::int64_t> samples,
                       const std::optional<std::string>& exchange, int ulysses_degree,
                       double offload) {
             const auto fitting = ranks.size() > 1 ? plan::Exchange::kRing : plan::Exchange::kLocal;
             return Unit{std::move(ranks), std::move(samples),
                         exchange ? plan::parse_exchange(*exchange) : fitting, ulysses_degree,
                         offload};
           }),
           py::arg("ranks"), py::arg("samples"), py::kw_only(), py::arg("exchange") = py::none(),
           py::arg("ulysses_degree") = 0, py::arg("offload") = 0.0,
           "`exchange` is local for one rank and ring for several unless given.")
      .def_readwrite("ranks", &Unit::ranks)
      .def_readwrite("samples", &Unit::samples)
      .def_property(
          "exchange", [](const Unit& unit) { return std::string(plan::to_string(unit.exchange)); },
          [](Unit& unit, const std::string& name) { unit.exchange = plan::parse_exchange(name); })
      .def_readwrite("ulysses_degree", &Unit::ulysses_degree)
      .def_readwrite("offload", &Unit::offload)
      .def("__repr__", &repr)
      .def(py::self == py::self);
  py::class_<plan::PlacedUnit, Unit>(module, "PlacedUnit", "A unit and its place in the order.")
      .def_readonly("slot", &plan::PlacedUnit::slot)
      .def_readonly("index", &plan::PlacedUnit::index, "Position in the slot.");
  py::class_<plan::Slot>(module, "Slot", "A position in the global order.")
      .def(py::init([](std::vector<Unit> units) { return plan::Slot{std::move(units)}; }),
           py::arg("units"))
      .def_readwrite("units", &plan::Slot::units, "A copy; assign a list to change it.")
      .def(py::self == py::self);
}

void bind_rank_plan(py::module_& module) {
  py::class_<plan::RankUnit, plan::PlacedUnit>(module, "RankUnit",
                                               "One micro-batch of one HDP rank.")
      .def_readonly("member", &plan::RankUnit::member, "This rank's position in `ranks`.")
      .def_readonly("cu_seqlens", &plan::RankUnit::cu_seqlens, "Ends of the whole documents.")
      .def_readonly("local_cu_seqlens", &plan::RankUnit::local_cu_seqlens,
                    "Ends of this rank's share of each document.")
      .def_property_readonly(
          "ranges",
          [](const plan::RankUnit& unit) {
            py::list documents;
            for (const auto& two : unit.ranges) {
              documents.append(py::make_tuple(py::make_tuple(two[0].begin, two[0].end),
                                              py::make_tuple(two[1].begin, two[1].end)));
            }
            return documents;
          },
          "Per document, the two half-open token ranges that this rank holds.");
  const auto lists = [](auto member) {
    return [member](const plan::RankPlan& mine) {
      py::list result;
      for (const auto& unit : mine.units) result.append(unit.*member);
      return result;
    };
  };
  py::class_<plan::RankPlan>(module, "RankPlan", "What one HDP rank runs in a step, in order.")
      .def_readonly("rank", &plan::RankPlan::rank)
      .def_readonly("units", &plan::RankPlan::units)
      .def_property_readonly("samples", lists(&plan::RankUnit::samples),
                             "Sample ids, a list for each micro-batch.")
      .def_property_readonly("cu_seqlens", lists(&plan::RankUnit::cu_seqlens),
                             "Cumulative lengths of whole documents, a list for each micro-batch.")
      .def_property_readonly("local_cu_seqlens", lists(&plan::RankUnit::local_cu_seqlens),
                             "Cumulative lengths of this rank's shares.");
}

void bind_plan(py::module_& module) {
  py::class_<plan::Prediction>(module, "Prediction", "Figures of the plan file's `predicted`.")
      .def(py::init<>())
      .def_readwrite("makespan", &plan::Prediction::makespan)
      .def_readwrite("lower_bound", &plan::Prediction::lower_bound)
      .def_readwrite("efficiency", &plan::Prediction::efficiency)
      .def_readwrite("exchange_tokens", &plan::Prediction::exchange_tokens)
      .def_readwrite("step_time", &plan::Prediction::step_time)
      .def("__repr__",
           [](const plan::Prediction& p) {
             return py::str(
                        "Prediction(makespan={}, lower_bound={}, efficiency={:.4f}, "
                        "exchange_tokens={})")
                 .format(p.makespan, p.lower_bound, p.efficiency, p.exchange_tokens);
           })
      .def(py::self == py::self);
  py::class_<StepPlan>(module, "StepPlan", "What happens in one optimizer step, as plain data.")
      .def(py::init<>())
      .def_readwrite("step", &StepPlan::step)
      .def_readwrite("strategy", &StepPlan::strategy)
      .def_readwrite("layout", &StepPlan::layout)
      .def_readwrite("capacity_tokens", &StepPlan::capacity_tokens)
      .def_property(
          "lockstep",
          [](const StepPlan& self) { return std::string(plan::to_string(self.lockstep)); },
          [](StepPlan& self, const std::string& name) {
            self.lockstep = plan::parse_lockstep(name);
          })
      .def_readwrite("ranks_per_node", &StepPlan::ranks_per_node,
                     "HDP ranks of a node, as the planner was told; 0: all in one.")
      .def_readwrite("memory", &StepPlan::memory)
      .def_readwrite("cost", &StepPlan::cost)
      .def_readwrite("samples", &StepPlan::samples, "A copy; assign a list to change it.")
      .def_readwrite("slots", &StepPlan::slots, "A copy; assign a list to change it.")
      .def_readwrite("predicted", &StepPlan::predicted)
      .def("units", &plan::placed_units, "All units in global order, each with its `.slot`.")
      .def("for_rank", &plan::rank_plan, py::arg("rank"), "What one HDP rank runs, as plain lists.")
      .def("sample_ranks", &plan::sample_ranks, "The HDP ranks of every sample, by id.")
      .def("rank_finish_times", &plan::rank_finish_times, "When every HDP rank ends.")
      .def("total_tokens", &StepPlan::total_tokens)
      .def("total_loss_tokens", &StepPlan::total_loss_tokens)
      .def("predict_", &plan::predict_, "Fills `predicted` from the slots.")
      .def("to_json", &StepPlan::to_json, NoGil())
      .def_static("from_json", &StepPlan::from_json, py::arg("text"), NoGil())
      .def(
          "save",
          [](const StepPlan& self, const py::object& path) {
            const auto name = py::module_::import("os").attr("fspath")(path).cast<std::string>();
            const py::gil_scoped_release release;
            self.save(name);
          },
          py::arg("path"))
      .def_static(
          "load",
          [](const py::object& path) {
            const auto name = py::module_::import("os").attr("fspath")(path).cast<std::string>();
            const py::gil_scoped_release release;
            return StepPlan::load(name);
          },
          py::arg("path"))
      .def("hash", &StepPlan::hash, NoGil())
      .def("__repr__",
           [](const StepPlan& self) {
             return py::str("StepPlan(step={}, strategy={!r}, layout=\"{}\", samples={}, slots={})")
                 .format(self.step, self.strategy, self.layout.to_string(), self.samples.size(),
                         self.slots.size());
           })
      .def("__copy__", [](const StepPlan& self) { return self; })
      .def("__deepcopy__", [](const StepPlan& self, const py::dict&) { return self; })
      .def(py::pickle(
          [](const StepPlan& self) { return py::make_tuple(self.to_json()); },
          [](const py::tuple& state) { return StepPlan::from_json(state[0].cast<std::string>()); }))
      .def(py::self == py::self);
}

}  // namespace

void bind_step_plan(py::module_& module) {
  bind_units(module);
  bind_rank_plan(module);
  bind_plan(module);
  module.def("parse_exchange", &checked_exchange, py::arg("name"),
             "The name itself, if it is one; else InvalidArgument lists the known ones.");
  module.def("parse_lockstep", &checked_lockstep, py::arg("name"),
             "The name itself, if it is one; else InvalidArgument lists the known ones.");
  module.def(
      "chunk_range",
      [](std::int64_t tokens, int degree, int chunk) {
        const auto range = plan::chunk_range(tokens, degree, chunk);
        return std::make_pair(range.begin, range.end);
      },
      py::arg("tokens"), py::arg("degree"), py::arg("chunk"),
      "Chunk k of 2D of a document, as (begin, end).");
  module.def(
      "member_ranges",
      [](std::int64_t tokens, int degree, int index) {
        const auto two = plan::member_ranges(tokens, degree, index);
        return std::make_pair(std::make_pair(two[0].begin, two[0].end),
                              std::make_pair(two[1].begin, two[1].end));
      },
      py::arg("tokens"), py::arg("degree"), py::arg("index"),
      "The two token ranges that one member of a unit holds of a document.");
}

}  // namespace meshloom::bindings
