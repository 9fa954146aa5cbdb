// The model on a single rank, for tests against transformers and the safetensors package:
//   model_reference step MODEL_DIR SEQUENCES.jsonl OUT.safetensors   loss and gradients of one step
//     [--dtype float64|float32|bfloat16] [--balance C] [--balance-form F] [--steps N] [--z-loss C]
//     with more than one step: the last one's, the balance loss having seen those before
//   model_reference config CONFIG.json                              as it is understood, on stdout
//   model_reference copy IN.safetensors OUT.safetensors             every tensor, read and written
//   model_reference save MODEL_DIR OUT_DIR DTYPE SHARD_BYTES        loaded and saved again
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/model/reference.h"

namespace {

using meshloom::InvalidArgument;

std::vector<meshloom::model::Document> read_documents(const std::string& path) {
  std::ifstream file(path);
  std::vector<meshloom::model::Document> documents;
  for (std::string line; std::getline(file, line);) {
    const auto object = nlohmann::json::parse(line);
    documents.push_back({object.at("tokens").get<std::vector<std::int64_t>>(), {}});
    if (object.contains("loss_mask")) {
      for (const auto& flag : object["loss_mask"]) {
        documents.back().loss_mask.push_back(flag.is_boolean() ? flag.get<bool>() : flag != 0);
      }
    }
  }
  return documents;
}

at::ScalarType parse_dtype(const std::string& name) {
  if (name == "float64") return at::kDouble;
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  throw InvalidArgument("model_reference", "unknown dtype " + name);
}

namespace model = meshloom::model;

struct Loaded {
  model::ModelConfig config;
  model::ParameterTable table;
  at::Tensor values;
};

Loaded load(const std::string& folder, at::ScalarType dtype) {
  Loaded loaded;
  loaded.config = model::ModelConfig::load(folder + "/config.json");
  loaded.table = model::parameter_table(loaded.config, {0, loaded.config.layers}, true, true);
  loaded.values = at::empty({loaded.table.elements}, at::TensorOptions().dtype(dtype));
  model::load_pretrained(folder, loaded.config, loaded.table, loaded.values);
  return loaded;
}

void step(const std::vector<std::string>& arguments) {
  const std::string& folder = arguments.at(0);
  at::ScalarType dtype = at::kDouble;
  int steps = 1;
  model::ReferenceOptions options;
  for (std::size_t i = 3; i + 1 < arguments.size(); i += 2) {
    if (arguments[i] == "--dtype") dtype = parse_dtype(arguments[i + 1]);
    if (arguments[i] == "--balance") options.balance_coefficient = std::stod(arguments[i + 1]);
    if (arguments[i] == "--balance-form") options.balance_form = arguments[i + 1];
    if (arguments[i] == "--steps") steps = std::stoi(arguments[i + 1]);
    if (arguments[i] == "--z-loss") options.z_coefficient = std::stod(arguments[i + 1]);
  }
  const Loaded loaded = load(folder, dtype);
  const auto documents = read_documents(arguments.at(1));
  model::ReferenceStep result;
  for (int i = 0; i < steps; ++i) {
    result = model::reference_step(loaded.config, loaded.values, documents, options);
    options.balance_state = result.balance_state;
  }
  auto dump = model::views_like_checkpoint(folder, loaded.config, loaded.table, result.gradients);
  dump.emplace_back("loss", at::scalar_tensor(result.loss, at::TensorOptions().dtype(at::kDouble)));
  model::save_safetensors(arguments.at(2), dump);
}

void copy(const std::vector<std::string>& arguments) {
  const model::SafetensorsFile file(arguments.at(0));
  model::save_safetensors(arguments.at(1), model::load_safetensors(arguments.at(0)),
                          file.metadata());
}

void save(const std::vector<std::string>& arguments) {
  const at::ScalarType dtype = parse_dtype(arguments.at(2));
  const Loaded loaded = load(arguments.at(0), dtype);
  model::save_pretrained(arguments.at(1), loaded.config, loaded.table, loaded.values,
                         {.dtype = dtype, .max_shard_bytes = std::stoll(arguments.at(3))});
}

void run(std::vector<std::string> arguments) {
  const std::string command = arguments.at(0);
  arguments.erase(arguments.begin());
  if (command == "step") return step(arguments);
  if (command == "copy") return copy(arguments);
  if (command == "save") return save(arguments);
  if (command == "config") {
    std::fputs(model::ModelConfig::load(arguments.at(0)).to_json().c_str(), stdout);
    return;
  }
  throw InvalidArgument("model_reference", "unknown command " + command);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
