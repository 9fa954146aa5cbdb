#include "meshloom/sim/simulator.h"

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>

#include "bindings/plan/topics.h"
#include "meshloom/plan/schedule.h"
#include "meshloom/sim/cluster.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using sim::Cluster;
using sim::Link;
using sim::SimulatedSpan;
using sim::Simulation;
using sim::Workload;

void bind_cluster(py::module_& module) {
  py::class_<Link>(module, "Link", "b bytes take latency + b / bandwidth (seconds, bytes/second).")
      .def(py::init([](double bandwidth, double latency) {
             return Link{bandwidth, latency};
           }),
           py::arg("bandwidth"), py::arg("latency") = 0.0)
      .def_readwrite("bandwidth", &Link::bandwidth)
      .def_readwrite("latency", &Link::latency)
      .def(py::self == py::self);
  py::class_<Cluster>(module, "Cluster", "The machines; world ranks fill nodes in order.")
      .def(py::init<>())
      .def_readwrite("ranks_per_node", &Cluster::ranks_per_node)
      .def_readwrite("nodes", &Cluster::nodes, "0: as many as the ranks need.")
      .def_readwrite("compute_rate", &Cluster::compute_rate)
      .def_readwrite("slow_ranks", &Cluster::slow_ranks, "A copy; assign a dict to change it.")
      .def_readwrite("inside", &Cluster::inside, "Between ranks of one node.")
      .def_readwrite("between", &Cluster::between, "Between nodes, per rank.")
      .def_readwrite("node_bandwidth", &Cluster::node_bandwidth,
                     "Of all ranks of a node together to other nodes; 0: no limit but theirs.")
      .def_readwrite("host", &Cluster::host, "Device to host memory, per rank.")
      .def_readwrite("loader_seconds", &Cluster::loader_seconds)
      .def_readwrite("overlap", &Cluster::overlap,
                     "Part of transfers that computation hides where there is some.")
      .def_static("load", &Cluster::load, py::arg("path"))
      .def_static("from_yaml",
                  py::overload_cast<const std::string&, const std::string&, const Cluster&>(
                      &Cluster::from_yaml),
                  py::arg("text"), py::arg("name") = "cluster",
                  py::arg_v("base", Cluster{}, "Cluster()"));
  py::class_<Workload>(module, "Workload", "The model as the simulator sees it.")
      .def(py::init<>())
      .def_readwrite("layers", &Workload::layers)
      .def_readwrite("seconds_per_work", &Workload::seconds_per_work)
      .def_readwrite("forward_share", &Workload::forward_share)
      .def_readwrite("weight_gradient_share", &Workload::weight_gradient_share)
      .def_property(
          "heads", [](const Workload& w) { return w.attention.heads; },
          [](Workload& w, std::int64_t value) { w.attention.heads = value; })
      .def_property(
          "key_value_heads", [](const Workload& w) { return w.attention.key_value_heads; },
          [](Workload& w, std::int64_t value) { w.attention.key_value_heads = value; })
      .def_property(
          "head_dim", [](const Workload& w) { return w.attention.head_dim; },
          [](Workload& w, std::int64_t value) { w.attention.head_dim = value; })
      .def_property(
          "window", [](const Workload& w) { return w.attention.window; },
          [](Workload& w, std::int64_t value) { w.attention.window = value; })
      .def_property(
          "element_bytes", [](const Workload& w) { return w.attention.element_bytes; },
          [](Workload& w, std::int64_t value) { w.attention.element_bytes = value; })
      .def_property(
          "wire_bytes", [](const Workload& w) { return w.attention.wire_bytes; },
          [](Workload& w, std::int64_t value) { w.attention.wire_bytes = value; })
      .def_property(
          "statistic_bytes", [](const Workload& w) { return w.attention.statistic_bytes; },
          [](Workload& w, std::int64_t value) { w.attention.statistic_bytes = value; })
      .def_readwrite("hidden_bytes", &Workload::hidden_bytes)
      .def_readwrite("saved_bytes", &Workload::saved_bytes)
      .def_readwrite("parameter_bytes", &Workload::parameter_bytes)
      .def_readwrite("gradient_bytes", &Workload::gradient_bytes)
      .def_readwrite("expert_parameter_bytes", &Workload::expert_parameter_bytes)
      .def_readwrite("expert_gradient_bytes", &Workload::expert_gradient_bytes)
      .def_readwrite("zero", &Workload::zero, "Of plans in lockstep over the HDP axis.")
      .def_readwrite("mixture_share", &Workload::mixture_share, "Of the layers.")
      .def_readwrite("recompute", &Workload::recompute,
                     "Traffic of forward that backward repeats; what it computes is the cost's.")
      .def_readwrite("dispatch_bytes", &Workload::dispatch_bytes)
      .def_readwrite("expert_share", &Workload::expert_share,
                     "Part of the linear work that goes where tokens are dispatched to.")
      .def_readwrite("stage_shares", &Workload::stage_shares,
                     "Of the computation; empty: even. A copy; assign a list to change it.")
      .def_readwrite("step_seconds", &Workload::step_seconds)
      .def_static("from_yaml", &Workload::from_yaml, py::arg("text"), py::arg("name") = "cluster",
                  py::arg_v("base", Workload{}, "Workload()"))
      .def_static("llama_7b", &Workload::llama_7b, "ByteScale's figure 6.")
      .def_static("llama_7b_cost", &Workload::llama_7b_cost,
                  "The cost model in whose units llama_7b counts seconds.");
}

}  // namespace

void bind_simulator(py::module_& module) {
  bind_cluster(module);
  py::class_<SimulatedSpan>(module, "SimulatedSpan", "One instruction of one rank, in seconds.")
      .def_readonly("rank", &SimulatedSpan::rank)
      .def_property_readonly(
          "op", [](const SimulatedSpan& self) { return std::string(plan::to_string(self.op)); })
      .def_readonly("slot", &SimulatedSpan::slot)
      .def_readonly("unit", &SimulatedSpan::unit)
      .def_readonly("chunk", &SimulatedSpan::chunk)
      .def_readonly("begin", &SimulatedSpan::begin)
      .def_readonly("compute", &SimulatedSpan::compute)
      .def_readonly("exposed", &SimulatedSpan::exposed)
      .def_readonly("end", &SimulatedSpan::end);
  py::class_<Simulation>(module, "Simulation", "Times in seconds, bytes as sent.")
      .def_readonly("step_time", &Simulation::step_time)
      .def_readonly("finish", &Simulation::finish, "Of every world rank.")
      .def_readonly("busy", &Simulation::busy, "Computation of every world rank.")
      .def_readonly("exposed", &Simulation::exposed, "Unhidden communication of every world rank.")
      .def_readonly("peak_memory", &Simulation::peak_memory, "Bytes of saved activations.")
      .def_readonly("bytes_inside", &Simulation::bytes_inside)
      .def_readonly("bytes_between", &Simulation::bytes_between)
      .def_readonly("bytes_host", &Simulation::bytes_host)
      .def_readonly("spans", &Simulation::spans)
      .def_property_readonly("bubble", &Simulation::bubble,
                             "Mean time without computation, as a part of the step.");
  module.def(
      "simulate",
      [](const plan::StepPlan& step_plan, const Cluster& cluster, const Workload& workload,
         const std::string& schedule, std::shared_ptr<const plan::Schedule> table, bool spans) {
        const py::gil_scoped_release release;
        const auto programs = plan::compile(
            step_plan,
            {.layers = workload.layers, .schedule = schedule, .table = std::move(table)});
        return sim::simulate(step_plan, programs, cluster, workload, {.spans = spans});
      },
      py::arg("plan"), py::arg("cluster"), py::arg("workload"), py::kw_only(),
      py::arg("schedule") = std::string(), py::arg("table") = py::none(), py::arg("spans") = false,
      "Compiles the plan's programs and runs them on a cost model.");
}

}  // namespace meshloom::bindings
