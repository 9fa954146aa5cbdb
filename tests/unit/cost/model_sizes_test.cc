#include "meshloom/cost/model_sizes.h"

#include <gtest/gtest.h>

#include "meshloom/core/error.h"

namespace meshloom {
namespace {

ModelSizes llama_7b() {
  return {.hidden = 4096,
          .heads = 32,
          .key_value_heads = 32,
          .head_dim = 128,
          .intermediate = 11008,
          .vocabulary = 32000,
          .moe_layers = std::vector<bool>(32, false)};
}

TEST(ModelSizes, ParametersOfLlamaArePublished) {
  EXPECT_EQ(parameter_count(llama_7b()), 6738415616);  // the checkpoint's
}

TEST(ModelSizes, TensorRanksShareWhatTheySplit) {
  ModelSizes model = llama_7b();
  model.key_value_heads = 2;
  model.intermediate = 11009;
  const LayerParameters whole = layer_parameters(model, 0, 0, 1);
  std::int64_t split = 0;
  std::int64_t key_value = 0;
  for (int rank = 0; rank < 4; ++rank) {
    const LayerParameters own = layer_parameters(model, 0, rank, 4);
    split += own.split;
    key_value += own.key_value;
    EXPECT_EQ(own.replicated, whole.replicated);
  }
  EXPECT_EQ(split + key_value / 2, whole.split);  // pairs of ranks hold one K/V head
}

TEST(ModelSizes, BadSizesAreNamed) {
  ModelSizes bad = llama_7b();
  bad.heads = 0;
  EXPECT_THROW((void)parameter_count(bad), InvalidArgument);
  bad = llama_7b();
  bad.experts = 4;
  bad.expert_intermediate = 8;
  bad.experts_per_token = 5;
  EXPECT_THROW((void)parameter_count(bad), InvalidArgument);
}

}  // namespace
}  // namespace meshloom
