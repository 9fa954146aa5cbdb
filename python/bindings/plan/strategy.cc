#include "meshloom/plan/strategy.h"

#include <pybind11/stl.h>
#include <pybind11/trampoline_self_life_support.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/plan/topics.h"
#include "meshloom/core/error.h"
#include "meshloom/plan/bounds.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using plan::BalanceStrategy;
using plan::PlanProblem;
using plan::Slot;
using plan::StrategyRegistry;
using plan::Unit;

/// What a Python `assign` returned: units in global order, or slots.
std::vector<Slot> read_assignment(const py::object& result, const PlanProblem& problem) {
  const auto refuse = [&](const py::handle& found) {
    throw PlanError("plan.strategy", "assign returned " +
                                         py::type::of(found).attr("__name__").cast<std::string>() +
                                         ", expected a list of Unit or a list of Slot");
  };
  if (!py::isinstance<py::sequence>(result) || py::isinstance<py::str>(result)) refuse(result);
  std::vector<Unit> units;
  std::vector<Slot> slots;
  for (const py::handle item : result) {
    if (py::isinstance<Unit>(item) && slots.empty()) {
      units.push_back(item.cast<Unit>());
    } else if (py::isinstance<Slot>(item) && units.empty()) {
      slots.push_back(item.cast<Slot>());
    } else {
      refuse(item);
    }
  }
  return units.empty() ? slots : plan::into_slots(std::move(units), problem.layout.hdp);
}

class PythonStrategy : public BalanceStrategy, public py::trampoline_self_life_support {
 public:
  [[nodiscard]] std::vector<Slot> assign(const PlanProblem& problem) const override {
    const py::gil_scoped_acquire acquire;
    const py::function method =
        py::get_override(static_cast<const BalanceStrategy*>(this), "assign");
    if (!method) {
      throw NotSupported("plan.strategy", "the strategy class does not define assign(problem)");
    }
    return read_assignment(method(py::cast(problem)), problem);
  }
};

/// Keeps a Python factory and drops it with the GIL held.
StrategyRegistry::Factory python_factory(const py::function& factory) {
  const std::shared_ptr<py::function> held(new py::function(factory), [](py::function* function) {
    const py::gil_scoped_acquire acquire;
    delete function;
  });
  return [held]() -> std::shared_ptr<BalanceStrategy> {
    const py::gil_scoped_acquire acquire;
    return (*held)().cast<std::shared_ptr<BalanceStrategy>>();
  };
}

plan::StepPlan plan_by_name(const PlanProblem& problem, const std::string& name,
                            const StrategyRegistry& registry) {
  const auto strategy = registry.create(name);
  return plan::make_plan(problem, name, *strategy);
}

void bind_problem(py::module_& module) {
  py::class_<PlanProblem>(module, "PlanProblem", "Everything that a plan is a function of.")
      .def(py::init<>())
      .def_static("from_lengths", &PlanProblem::from_lengths, py::arg("lengths"), py::arg("layout"),
                  py::arg("capacity_tokens"), "Ids 0 .. n-1, every token but the first a target.")
      .def_readwrite("step", &PlanProblem::step)
      .def_readwrite("layout", &PlanProblem::layout)
      .def_readwrite("capacity_tokens", &PlanProblem::capacity_tokens)
      .def(
          "choose_exchanges",
          [](PlanProblem& self, const std::string& rules) {
            self.exchange_rules = plan::parse_exchange_rules(rules);
          },
          py::arg("rules"),
          "How units of some sizes exchange keys and values: NAME[:DEGREES[:TOKENS]],..., e.g. "
          "`ring:2-4,ulysses`.")
      .def_property(
          "lockstep",
          [](const PlanProblem& self) { return std::string(plan::to_string(self.lockstep)); },
          [](PlanProblem& self, const std::string& name) {
            self.lockstep = plan::parse_lockstep(name);
          })
      .def_readwrite("memory", &PlanProblem::memory)
      .def_readwrite("cost", &PlanProblem::cost)
      .def_readwrite("samples", &PlanProblem::samples, "A copy; assign a list to change it.")
      .def_readwrite("ranks_per_node", &PlanProblem::ranks_per_node)
      .def("validate", &PlanProblem::validate);
}

}  // namespace

void bind_strategy(py::module_& module) {
  bind_problem(module);
  py::class_<BalanceStrategy, PythonStrategy, py::smart_holder>(
      module, "BalanceStrategy",
      "Decides which ranks work together on which samples. Subclass it and define\n"
      "`assign(self, problem)` returning a list of Unit in global order, or of Slot.")
      .def(py::init<>())
      .def("assign", &BalanceStrategy::assign, py::arg("problem"),
           py::call_guard<py::gil_scoped_release>());
  py::class_<StrategyRegistry, std::shared_ptr<StrategyRegistry>>(
      module, "StrategyRegistry", "Name -> strategy; filled explicitly.")
      .def(py::init([] { return plan::make_strategy_registry(); }))
      .def(
          "add",
          [](StrategyRegistry& self, const std::string& name, const py::function& factory) {
            self.add(name, python_factory(factory));
          },
          py::arg("name"), py::arg("factory"), "`factory()` returns a BalanceStrategy.")
      .def("create", &StrategyRegistry::create, py::arg("name"))
      .def("names", &StrategyRegistry::names);

  const auto registry = plan::make_strategy_registry();
  module.attr("strategies") = registry;
  module.def(
      "strategy_names", [registry] { return registry->names(); }, "Registered strategies.");
  module.def(
      "register_strategy",
      [registry](const std::string& name) {
        return py::cpp_function([registry, name](const py::function& factory) {
          registry->add(name, python_factory(factory));
          return factory;
        });
      },
      py::arg("name"), "Class decorator: registers a BalanceStrategy under a name.");
  module.def(
      "make_plan",
      [registry](const PlanProblem& problem, const std::string& strategy) {
        const py::gil_scoped_release release;
        return plan_by_name(problem, strategy, *registry);
      },
      py::arg("problem"), py::arg("strategy") = "balanced",
      "Validates the problem, runs the strategy, predicts and verifies.");
  module.def(
      "make_plan",
      [](const PlanProblem& problem, const BalanceStrategy& strategy,
         const std::optional<std::string>& name) {
        const std::string shown =
            name ? *name : py::type::of(py::cast(strategy)).attr("__name__").cast<std::string>();
        const py::gil_scoped_release release;
        return plan::make_plan(problem, shown, strategy);
      },
      py::arg("problem"), py::arg("strategy"), py::arg("name") = py::none());
  module.def("lower_bound", &plan::lower_bound, py::arg("problem"),
             py::call_guard<py::gil_scoped_release>(),
             "A proven lower bound on the makespan of any plan.");
  module.def("into_slots", &plan::into_slots, py::arg("units"), py::arg("hdp"),
             "Units in order -> slots.");
}

}  // namespace meshloom::bindings
