#include "meshloom/cost/fit.h"

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/plan/topics.h"

namespace meshloom::bindings {

namespace py = pybind11;

void bind_fit(py::module_& module) {
  py::class_<UnitTiming>(module, "UnitTiming", "One unit as it was measured on one of its ranks.")
      .def(py::init([](const std::vector<double>& tokens, double seconds, int degree) {
             UnitTiming timing{.degree = degree, .seconds = seconds};
             for (const double length : tokens) {
               timing.square_sum += length * length;
               timing.token_sum += length;
             }
             return timing;
           }),
           py::arg("tokens"), py::arg("seconds"), py::arg("degree") = 1,
           "`tokens` of each sample; `seconds` of forward and backward.")
      .def_readwrite("square_sum", &UnitTiming::square_sum)
      .def_readwrite("token_sum", &UnitTiming::token_sum)
      .def_readwrite("degree", &UnitTiming::degree)
      .def_readwrite("seconds", &UnitTiming::seconds);
  py::class_<CostFit>(module, "CostFit", "A cost model and how well it explains the timings.")
      .def_readonly("model", &CostFit::model)
      .def_readonly("median_error", &CostFit::median_error)
      .def_readonly("worst_error", &CostFit::worst_error)
      .def_readonly("outliers", &CostFit::outliers);
  module.def(
      "fit_cost", [](const std::vector<UnitTiming>& timings) { return fit_cost(timings); },
      py::arg("timings"),
      "Least squares on relative errors; coefficients not negative, outliers weighted down.");
  py::class_<CostRefiner>(module, "CostRefiner", "Follows measured unit times while training.")
      .def(py::init<const CostModel&, double>(), py::arg("prior"), py::arg("horizon") = 512.0)
      .def("add", &CostRefiner::add, py::arg("timing"))
      .def_property_readonly("model", &CostRefiner::model)
      .def_property_readonly("units", &CostRefiner::units)
      .def_property_readonly("error", &CostRefiner::error)
      .def("to_json", &CostRefiner::to_json)
      .def_static(
          "from_json", [](const std::string& text) { return CostRefiner::from_json(text); },
          py::arg("text"))
      .def(py::self == py::self);
}

}  // namespace meshloom::bindings
