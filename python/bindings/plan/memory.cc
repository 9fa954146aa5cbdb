#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings/plan/topics.h"
#include "meshloom/plan/memory_changes.h"
#include "meshloom/plan/memory_forecast.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using plan::MemoryForecast;
using plan::MemorySetting;
using plan::StepLimits;

std::map<std::string, std::int64_t> parts_of(const MemoryForecast& forecast) {
  std::map<std::string, std::int64_t> parts;
  for (std::size_t p = 0; p < plan::kMemoryParts; ++p) {
    parts.emplace(plan::to_string(static_cast<plan::MemoryPart>(p)), forecast.bytes[p]);
  }
  return parts;
}

void bind_sizes(py::module_& module) {
  py::class_<ModelSizes>(module, "ModelSizes",
                         "Sizes of a decoder model, as far as memory depends on them.")
      .def(py::init<>())
      .def_readwrite("hidden", &ModelSizes::hidden)
      .def_readwrite("heads", &ModelSizes::heads)
      .def_readwrite("key_value_heads", &ModelSizes::key_value_heads)
      .def_readwrite("head_dim", &ModelSizes::head_dim, "Of queries and keys.")
      .def_readwrite("value_dim", &ModelSizes::value_dim, "0: head_dim.")
      .def_readwrite("rope_dim", &ModelSizes::rope_dim, "0: head_dim.")
      .def_readwrite("intermediate", &ModelSizes::intermediate)
      .def_readwrite("vocabulary", &ModelSizes::vocabulary)
      .def_readwrite("moe_layers", &ModelSizes::moe_layers, "A copy; assign a list to change it.")
      .def_readwrite("experts", &ModelSizes::experts)
      .def_readwrite("experts_per_token", &ModelSizes::experts_per_token)
      .def_readwrite("expert_intermediate", &ModelSizes::expert_intermediate)
      .def_readwrite("shared_intermediate", &ModelSizes::shared_intermediate)
      .def_readwrite("q_lora_rank", &ModelSizes::q_lora_rank)
      .def_readwrite("kv_lora_rank", &ModelSizes::kv_lora_rank)
      .def_readwrite("tied_embeddings", &ModelSizes::tied_embeddings)
      .def_readwrite("qkv_bias", &ModelSizes::qkv_bias)
      .def_readwrite("output_bias", &ModelSizes::output_bias)
      .def_readwrite("mlp_bias", &ModelSizes::mlp_bias)
      .def_readwrite("qk_norm", &ModelSizes::qk_norm)
      .def_readwrite("correction_bias", &ModelSizes::correction_bias)
      .def_property_readonly("parameter_count", &parameter_count)
      .def(py::self == py::self);
}

}  // namespace

void bind_memory(py::module_& module) {
  bind_sizes(module);
  py::class_<MemorySetting>(module, "MemorySetting",
                            "Everything a rank's memory depends on, beside the step it runs.")
      .def(py::init<>())
      .def_readwrite("model", &MemorySetting::model)
      .def_readwrite("layout", &MemorySetting::layout)
      .def_readwrite("zero", &MemorySetting::zero)
      .def_readwrite("schedule", &MemorySetting::schedule)
      .def_readwrite("split", &MemorySetting::split, "A copy; assign a list to change it.")
      .def_readwrite("recompute", &MemorySetting::recompute)
      .def_readwrite("element_bytes", &MemorySetting::element_bytes);
  py::class_<StepLimits>(module, "StepLimits", "What bounds the steps of a run, in tokens.")
      .def(py::init(
               [](std::int64_t capacity, std::int64_t global_batch, std::int64_t longest_document) {
                 return StepLimits{capacity, global_batch, longest_document};
               }),
           py::kw_only(), py::arg("capacity"), py::arg("global_batch"),
           py::arg("longest_document") = 1)
      .def_readwrite("capacity", &StepLimits::capacity)
      .def_readwrite("global_batch", &StepLimits::global_batch)
      .def_readwrite("longest_document", &StepLimits::longest_document);
  py::class_<MemoryForecast>(module, "MemoryForecast",
                             "What a rank holds when it holds most, in bytes of tensors.")
      .def_readonly("rank", &MemoryForecast::rank)
      .def_property_readonly("parts", &parts_of)
      .def_property_readonly("total", &MemoryForecast::total)
      .def_property_readonly("states", &MemoryForecast::states,
                             "Parameters, gradients, masters and moments.");
  py::class_<plan::MemoryChange>(module, "MemoryChange", "One way to hold less.")
      .def_readonly("setting", &plan::MemoryChange::setting)
      .def_readonly("bytes", &plan::MemoryChange::bytes, "Of the fullest rank then.");
  module.def("forecast_memory",
             py::overload_cast<const MemorySetting&, const StepLimits&>(&plan::forecast_memory),
             py::arg("setting"), py::arg("limits"),
             "Of the first rank of every pipeline stage, in the fullest step of these limits.");
  module.def("forecast_memory",
             py::overload_cast<const MemorySetting&, const plan::StepPlan&, const plan::Program&>(
                 &plan::forecast_memory),
             py::arg("setting"), py::arg("plan"), py::arg("program"),
             "Of the rank whose program it is.");
  module.def("memory_changes", &plan::memory_changes, py::arg("setting"), py::arg("limits"),
             py::arg("most_bytes"),
             "Settings with which the fullest rank holds at most `most_bytes`, or least.");
}

}  // namespace meshloom::bindings
