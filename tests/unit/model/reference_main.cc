// One step's loss and gradients on a single rank: model_reference MODEL_DIR SEQUENCES.jsonl OUT
// [--dtype float64|float32|bfloat16] [--balance C] [--z-loss C]. For tests against transformers.
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

void run(const std::vector<std::string>& arguments) {
  namespace model = meshloom::model;
  const std::string& folder = arguments.at(0);
  at::ScalarType dtype = at::kDouble;
  model::ReferenceOptions options;
  for (std::size_t i = 3; i + 1 < arguments.size(); i += 2) {
    if (arguments[i] == "--dtype") dtype = parse_dtype(arguments[i + 1]);
    if (arguments[i] == "--balance") options.balance_coefficient = std::stod(arguments[i + 1]);
    if (arguments[i] == "--z-loss") options.z_coefficient = std::stod(arguments[i + 1]);
  }
  const auto config = model::ModelConfig::load(folder + "/config.json");
  const auto table = model::parameter_table(config, {0, config.layers}, true, true);
  at::Tensor values = at::empty({table.elements}, at::TensorOptions().dtype(dtype));
  model::load_pretrained(folder, config, table, values);
  const model::ReferenceStep step =
      model::reference_step(config, values, read_documents(arguments.at(1)), options);
  auto dump = model::views_like_checkpoint(folder, config, table, step.gradients);
  dump.emplace_back("loss", at::scalar_tensor(step.loss, at::TensorOptions().dtype(at::kDouble)));
  model::save_safetensors(arguments.at(2), dump);
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
