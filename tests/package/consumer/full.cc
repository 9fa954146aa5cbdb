#include <cstdio>

#include "meshloom/model/config.h"
#include "meshloom/model/stage.h"

int main() {
  const auto config = meshloom::model::ModelConfig::from_json(
      R"({"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
          "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "silu",
          "rms_norm_eps": 1e-6})");
  const auto stage = meshloom::model::build_stage(config, {0, 2}, true, true);
  std::printf("%lld parameters\n", static_cast<long long>(stage->parameters().elements));
  return stage->parameters().elements > 0 ? 0 : 1;
}
