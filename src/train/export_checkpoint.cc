#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/train/checkpoint.h"
#include "train/internal/setup.h"

namespace meshloom::train {

void export_checkpoint(const std::string& checkpoint, const std::string& folder,
                       const std::string& dtype) {
  const at::ScalarType type = detail::parse_dtype_name(dtype);
  const CheckpointReader reader(checkpoint);
  const auto text = reader.info().texts.find("model");
  if (text == reader.info().texts.end()) {
    throw DataError("train.export_checkpoint", checkpoint + " names no model");
  }
  const model::ModelConfig config = model::ModelConfig::from_json(text->second);
  const model::ParameterTable table =
      model::parameter_table(config, {0, config.layers}, true, true);
  const model::TensorSource values = [&](const model::ParameterSpec& spec) {
    at::Tensor tensor = at::empty({spec.elements()}, type);
    reader.read(table, {spec.offset, spec.offset + spec.elements()}, "master", tensor);
    return tensor.view(spec.shape);
  };
  model::save_pretrained(folder, config, table, values, {.dtype = type});
}

}  // namespace meshloom::train
