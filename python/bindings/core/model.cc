#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/core/bindings.h"
#include "meshloom/model/config.h"
#include "meshloom/model/parameters.h"

namespace meshloom::bindings {

namespace py = pybind11;
using model::ModelConfig;

void bind_model(py::module_& module) {
  py::class_<model::RopeConfig>(module, "RopeConfig",
                                "Rotary embedding: default, linear, llama3 or yarn.")
      .def_readonly("type", &model::RopeConfig::type)
      .def_readonly("theta", &model::RopeConfig::theta)
      .def_readonly("factor", &model::RopeConfig::factor);
  py::class_<model::MoeConfig>(module, "MoeConfig", "Mixture of experts; no experts: dense.")
      .def_readonly("experts", &model::MoeConfig::experts)
      .def_readonly("experts_per_token", &model::MoeConfig::experts_per_token)
      .def_readonly("intermediate_size", &model::MoeConfig::intermediate_size)
      .def_readonly("normalize_top_k", &model::MoeConfig::normalize_top_k)
      .def_readonly("aux_loss_coefficient", &model::MoeConfig::aux_loss_coefficient);
  py::class_<ModelConfig>(module, "ModelConfig",
                          "A decoder language model, as its Hugging Face config.json says.")
      .def_static(
          "load", &ModelConfig::load, py::arg("path"),
          "Reads a config.json. Raises IoError, DataError (a field is missing or wrong) or\n"
          "NotSupported (a model_type or feature that is not built), by name.")
      .def_static("from_json", &ModelConfig::from_json, py::arg("text"))
      .def("to_json", &ModelConfig::to_json, "A config.json that transformers opens.")
      .def_property_readonly("parameter_count", &ModelConfig::parameter_count)
      .def_property_readonly(
          "parameters",
          [](const ModelConfig& self) {
            std::vector<std::pair<std::string, std::vector<std::int64_t>>> result;
            for (const auto& spec :
                 model::parameter_table(self, {0, self.layers}, true, true).parameters) {
              result.emplace_back(spec.name, spec.shape);
            }
            return result;
          },
          "Hugging Face name and shape of every parameter, in flat order.")
      .def_readonly("model_type", &ModelConfig::model_type)
      .def_readonly("vocab_size", &ModelConfig::vocab_size)
      .def_readonly("hidden_size", &ModelConfig::hidden_size)
      .def_readonly("intermediate_size", &ModelConfig::intermediate_size)
      .def_readonly("layers", &ModelConfig::layers)
      .def_readonly("heads", &ModelConfig::heads)
      .def_readonly("kv_heads", &ModelConfig::kv_heads)
      .def_readonly("head_dim", &ModelConfig::head_dim)
      .def_readonly("tie_word_embeddings", &ModelConfig::tie_word_embeddings)
      .def_readonly("windows", &ModelConfig::windows)
      .def_readonly("rope", &ModelConfig::rope)
      .def_readonly("moe", &ModelConfig::moe);
}

}  // namespace meshloom::bindings
