#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include "bindings/plan/topics.h"
#include "meshloom/cost/cost_model.h"
#include "meshloom/cost/memory_model.h"
#include "meshloom/mesh/layout.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;

void bind_layout(py::module_& module) {
  py::class_<Coordinates>(module, "Coordinates", "Where a world rank sits.")
      .def(py::init([](int tp, int hdp, int pp) {
             return Coordinates{tp, hdp, pp};
           }),
           py::arg("tp") = 0, py::arg("hdp") = 0, py::arg("pp") = 0)
      .def_readwrite("tp", &Coordinates::tp)
      .def_readwrite("hdp", &Coordinates::hdp)
      .def_readwrite("pp", &Coordinates::pp)
      .def(py::self == py::self);
  py::class_<Layout>(module, "Layout",
                     "Sizes of the static mesh: world = pp x hdp x tp, tp fastest.")
      .def(py::init([](int tp, int hdp, int pp, int ep, int chunks) {
             const Layout layout{.tp = tp, .hdp = hdp, .pp = pp, .ep = ep, .chunks = chunks};
             layout.validate();
             return layout;
           }),
           py::kw_only(), py::arg("tp") = 1, py::arg("hdp") = 1, py::arg("pp") = 1,
           py::arg("ep") = 1, py::arg("chunks") = 1)
      .def_readwrite("tp", &Layout::tp)
      .def_readwrite("hdp", &Layout::hdp)
      .def_readwrite("pp", &Layout::pp)
      .def_readwrite("ep", &Layout::ep)
      .def_readwrite("chunks", &Layout::chunks)
      .def_property_readonly("world_size", &Layout::world_size)
      .def("coordinates", &Layout::coordinates, py::arg("rank"))
      .def("rank", &Layout::rank, py::arg("at"))
      .def("validate", &Layout::validate)
      .def_static("parse", &Layout::parse, py::arg("text"), "Reads \"hdp=4,tp=2\".")
      .def("__str__", &Layout::to_string)
      .def("__repr__", [](const Layout& layout) { return "Layout(" + layout.to_string() + ")"; })
      .def(py::self == py::self);
}

}  // namespace

void bind_models(py::module_& module) {
  bind_layout(module);
  py::class_<CostModel>(module, "CostModel",
                        "Work of a sample: quadratic * s^2 + linear * s; a unit on D ranks takes "
                        "work / D + fixed + exchange * (D - 1) / D * tokens.")
      .def(py::init([](double quadratic, double linear, double fixed, double exchange) {
             const CostModel cost{quadratic, linear, fixed, exchange};
             cost.validate();
             return cost;
           }),
           py::kw_only(), py::arg("quadratic") = CostModel{}.quadratic,
           py::arg("linear") = CostModel{}.linear, py::arg("fixed") = CostModel{}.fixed,
           py::arg("exchange") = CostModel{}.exchange)
      .def_readwrite("quadratic", &CostModel::quadratic)
      .def_readwrite("linear", &CostModel::linear)
      .def_readwrite("fixed", &CostModel::fixed)
      .def_readwrite("exchange", &CostModel::exchange)
      .def("work", &CostModel::work, py::arg("tokens"))
      .def("unit_time", &CostModel::unit_time, py::arg("unit_work"), py::arg("unit_tokens"),
           py::arg("degree"))
      .def("validate", &CostModel::validate)
      .def(py::self == py::self);
  py::class_<MemoryModel>(module, "MemoryModel",
                          "What the offload rule needs; layers 0: no offload.")
      .def(py::init([](int layers, int resident_layers, double transfer) {
             const MemoryModel memory{
                 .layers = layers, .resident_layers = resident_layers, .transfer = transfer};
             memory.validate();
             return memory;
           }),
           py::kw_only(), py::arg("layers") = MemoryModel{}.layers,
           py::arg("resident_layers") = MemoryModel{}.resident_layers,
           py::arg("transfer") = MemoryModel{}.transfer)
      .def_readwrite("layers", &MemoryModel::layers)
      .def_readwrite("resident_layers", &MemoryModel::resident_layers)
      .def_readwrite("transfer", &MemoryModel::transfer)
      .def("most_hidden", &MemoryModel::most_hidden, py::arg("cost"), py::arg("tokens"))
      .def("resident_fraction", &MemoryModel::resident_fraction, py::arg("offload"))
      .def("unit_capacity", &MemoryModel::unit_capacity, py::arg("capacity_tokens"),
           py::arg("degree"), py::arg("offload"))
      .def("offload_needed", &MemoryModel::offload_needed, py::arg("capacity_tokens"),
           py::arg("degree"), py::arg("tokens"))
      .def("degree_needed", &MemoryModel::degree_needed, py::arg("capacity_tokens"),
           py::arg("offload"), py::arg("tokens"), py::arg("most"))
      .def("validate", &MemoryModel::validate)
      .def(py::self == py::self);
}

}  // namespace meshloom::bindings
