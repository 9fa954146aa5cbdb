// Experts that move between steps: the same training, better balanced.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/train/trainer.h"
#include "model_difference.h"
#include "tiny_run.h"
#include "train/internal/expert_loads.h"
#include "unit/temporary_folder.h"

namespace meshloom::train::expert_replan {
namespace {

// DESIGN.md: losses and norms of fp64, relative. The norm is a sum over ranks, whose parts change
// with the placement.
constexpr double kSumParity = 1e-10;

model::ModelConfig mixtral() {
  return model::ModelConfig::from_json(R"({
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.1,
    "router_aux_loss_coef": 0.02})");
}

/// A dense layer between two mixtures, tied.
model::ModelConfig qwen() {
  return model::ModelConfig::from_json(R"({
    "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "initializer_range": 0.1, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "norm_topk_prob": true, "mlp_only_layers": [1],
    "router_aux_loss_coef": 0.02, "tie_word_embeddings": true})");
}

model::ModelConfig deepseek() {
  return model::ModelConfig::from_json(R"({
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "first_k_dense_replace": 1,
    "initializer_range": 0.1, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "aux_loss_alpha": 0.05})");
}

struct Spread {
  Layout layout;
  ParallelSection parallel{};
};

std::string text_of(const Spread& run) {
  return run.layout.to_string() + ", zero " + std::to_string(run.parallel.zero);
}

TrainConfig config_of(const std::string& folder, const Spread& run, std::int64_t steps,
                      std::int64_t replan_every) {
  TrainConfig config = tiny_config(folder, steps);
  config.dtype = "float64";
  config.layout = run.layout;
  config.parallel = run.parallel;
  config.parallel.experts = {.replan_every = replan_every, .least_gain = 0.0};
  config.clip_norm = 0.0;
  return config;
}

void on_ranks(const TrainConfig& config, const model::ModelConfig& model,
              const std::function<void(Trainer&, int rank)>& body,
              const std::vector<data::Document>& documents = tiny_documents()) {
  comm::run_thread_ranks(config.layout.world_size(), [&](comm::Communicator world) {
    Trainer trainer(config, model, tiny_loader(documents), world);
    body(trainer, world.rank());
  });
}

/// Trains on, up to `steps` in all, and saves the model and, where `checkpoint`, the state.
std::vector<StepMetrics> train(const TrainConfig& config, const model::ModelConfig& model,
                               std::int64_t steps, const std::string& saved,
                               bool checkpoint = false) {
  std::vector<StepMetrics> result;
  on_ranks(config, model, [&](Trainer& trainer, int rank) {
    while (trainer.next_step() < steps) {
      const StepMetrics metrics = trainer.step();
      if (rank == 0) result.push_back(metrics);
    }
    if (checkpoint) trainer.save_checkpoint();
    trainer.save_pretrained(saved);
  });
  return result;
}

double moved_in(const std::vector<StepMetrics>& steps) {
  double result = 0.0;
  for (const StepMetrics& step : steps) {
    const auto found = step.extra.find("experts_moved");
    if (found != step.extra.end()) result += found->second;
  }
  return result;
}

void expect_same_steps(const std::vector<StepMetrics>& given,
                       const std::vector<StepMetrics>& expected) {
  ASSERT_EQ(given.size(), expected.size());
  for (std::size_t i = 0; i < given.size(); ++i) {
    EXPECT_EQ(given[i].loss, expected[i].loss) << i;
    EXPECT_EQ(given[i].aux_loss, expected[i].aux_loss) << i;
    EXPECT_NEAR(given[i].gradient_norm, expected[i].gradient_norm,
                kSumParity * expected[i].gradient_norm)
        << i;
  }
}

void check_family(const model::ModelConfig& model, const std::vector<Spread>& runs) {
  constexpr std::int64_t kSteps = 4;
  for (const Spread& run : runs) {
    SCOPED_TRACE(model.model_type + ", " + text_of(run));
    const TemporaryFolder folder;
    const auto expected = train(config_of(folder.file("still"), run, kSteps, 0), model, kSteps,
                                folder.file("still-model"));
    const auto given = train(config_of(folder.file("moving"), run, kSteps, 1), model, kSteps,
                             folder.file("moving-model"));
    expect_same_steps(given, expected);
    EXPECT_GE(moved_in(given), 8.0) << "too few moves to prove anything";
    EXPECT_EQ(moved_in(expected), 0.0);
    EXPECT_EQ(largest_difference(folder.file("moving-model"), folder.file("still-model")), 0.0);
  }
}

/// Every sum keeps its order: a row's by a token's choices, an expert's weight gradient by sender,
/// replicas' by group. So, without clipping by the norm, weights are the same bits.
TEST(ExpertReplan, MovingAfterEveryStepChangesNoBitOfMixtral) {
  check_family(mixtral(), {{{.hdp = 2, .ep = 2}},
                           {{.hdp = 4, .ep = 2}, {.zero = 2}},
                           {{.hdp = 8, .ep = 4}, {.zero = 3}},
                           {{.hdp = 8, .ep = 2}, {.zero = 2, .ranks_per_node = 4}},
                           {{.tp = 2, .hdp = 2, .pp = 2, .ep = 2}, {.pipeline = "zb_h1"}}});
}

TEST(ExpertReplan, MovingAfterEveryStepChangesNoBitOfQwen) {
  check_family(qwen(), {{{.hdp = 4, .ep = 4}},
                        {{.hdp = 8, .ep = 4}, {.zero = 2}},
                        {{.tp = 2, .hdp = 4, .ep = 2}, {.zero = 3}},
                        {{.hdp = 4, .pp = 2, .ep = 4}, {.recompute = "full"}}});
}

TEST(ExpertReplan, MovingAfterEveryStepChangesNoBitOfDeepseek) {
  check_family(deepseek(), {{{.hdp = 4, .ep = 2}},
                            {{.hdp = 4, .ep = 4}, {.zero = 2, .ranks_per_node = 2}},
                            {{.tp = 2, .hdp = 2, .ep = 2}, {.zero = 2}},
                            {{.hdp = 4, .ep = 2}, {.zero = 3}},
                            {{.hdp = 4, .pp = 2, .ep = 2}, {.zero = 3, .recompute = "selective"}}});
}

/// Clipping reads the norm, and so the order of its sum.
TEST(ExpertReplan, ClippedStepsDifferByRoundingAlone) {
  const TemporaryFolder folder;
  TrainConfig still = config_of(folder.file("still"), {{.hdp = 4, .ep = 2}}, 5, 0);
  still.clip_norm = 0.5;
  TrainConfig moving = config_of(folder.file("moving"), {{.hdp = 4, .ep = 2}}, 5, 1);
  moving.clip_norm = 0.5;
  const auto expected = train(still, qwen(), 5, folder.file("still-model"));
  const auto given = train(moving, qwen(), 5, folder.file("moving-model"));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(given[i].loss, expected[i].loss, kSumParity * expected[i].loss);
  }
  EXPECT_LE(largest_difference(folder.file("moving-model"), folder.file("still-model")),
            kSumParity);
}

/// bf16 with fp32 masters: values, masters and moments are different numbers.
TEST(ExpertReplan, HalfPrecisionMovesToo) {
  for (const int zero : {1, 3}) {
    const TemporaryFolder folder;
    const Spread run{{.hdp = 4, .ep = 2}, {.zero = zero}};
    TrainConfig still = config_of(folder.file("still"), run, 4, 0);
    still.dtype = "bfloat16";
    TrainConfig moving = config_of(folder.file("moving"), run, 4, 1);
    moving.dtype = "bfloat16";
    const auto expected = train(still, mixtral(), 4, folder.file("still-model"));
    const auto given = train(moving, mixtral(), 4, folder.file("moving-model"));
    EXPECT_GT(moved_in(given), 0.0);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(given[i].loss, expected[i].loss) << i;
    }
    EXPECT_EQ(largest_difference(folder.file("moving-model"), folder.file("still-model")), 0.0);
  }
}

/// Rules that treat experts differently go with them.
TEST(ExpertReplan, RulesFollowTheirExperts) {
  const TemporaryFolder folder;
  const Spread run{{.hdp = 4, .ep = 2}};
  const std::vector<ParameterRule> rules{
      {.pattern = R"(experts\.[036]\.)", .lr_factor = 0.5, .weight_decay = 0.3},
      {.pattern = R"(experts\.1\.)", .frozen = true}};
  TrainConfig still = config_of(folder.file("still"), run, 4, 0);
  TrainConfig moving = config_of(folder.file("moving"), run, 4, 1);
  still.rules = moving.rules = rules;
  const auto expected = train(still, qwen(), 4, folder.file("still-model"));
  const auto given = train(moving, qwen(), 4, folder.file("moving-model"));
  EXPECT_GT(moved_in(given), 0.0);
  expect_same_steps(given, expected);
  EXPECT_EQ(largest_difference(folder.file("moving-model"), folder.file("still-model")), 0.0);
}

/// The placement and the loads of a decision that is not due yet are part of a checkpoint.
TEST(ExpertReplan, ResumesBitForBitUnderTheSameLayout) {
  const TemporaryFolder folder;
  const Spread run{{.hdp = 4, .ep = 2}, {.zero = 2}};
  TrainConfig straight = config_of(folder.file("straight"), run, 6, 2);
  straight.clip_norm = 0.5;
  TrainConfig broken = straight;
  broken.run = folder.file("broken");
  const auto expected = train(straight, qwen(), 6, folder.file("straight-model"));
  auto given = train(broken, qwen(), 3, folder.file("half"), /*checkpoint=*/true);
  const auto rest = train(broken, qwen(), 6, folder.file("broken-model"));
  given.insert(given.end(), rest.begin(), rest.end());
  ASSERT_EQ(given.size(), expected.size());
  EXPECT_GT(moved_in(expected), 0.0);
  for (std::size_t i = 0; i < given.size(); ++i) {
    EXPECT_EQ(given[i].loss, expected[i].loss) << i;
    EXPECT_EQ(given[i].gradient_norm, expected[i].gradient_norm) << i;
    for (const char* name : {"experts_moved", "expert_rank_imbalance_planned"}) {
      EXPECT_EQ(given[i].extra.count(name), expected[i].extra.count(name)) << i;
      if (given[i].extra.count(name) == 0) continue;
      EXPECT_EQ(given[i].extra.at(name), expected[i].extra.at(name)) << i;
    }
  }
  EXPECT_EQ(largest_difference(folder.file("broken-model"), folder.file("straight-model")), 0.0);
}

TEST(ExpertReplan, CheckpointsOfMovedExpertsLoadUnderAnyLayout) {
  const TemporaryFolder folder;
  const auto expected =
      train(config_of(folder.file("one"), {}, 5, 0), qwen(), 5, folder.file("one-model"));
  // Moving between two, then four; then nowhere; then two again.
  const std::vector<Spread> runs{{{.hdp = 4, .ep = 2}},
                                 {{.hdp = 4, .ep = 4}, {.zero = 3}},
                                 {{.hdp = 3}},
                                 {{.tp = 2, .hdp = 2, .ep = 2}, {.zero = 2}},
                                 {}};
  std::vector<StepMetrics> given;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const auto steps = static_cast<std::int64_t>(i) + 1;
    const int every = runs[i].layout.ep > 1 ? 1 : 0;
    const auto part = train(config_of(folder.file("switching"), runs[i], 5, every), qwen(), steps,
                            folder.file("model"), /*checkpoint=*/true);
    ASSERT_EQ(part.size(), 1U);
    given.push_back(part.front());
  }
  EXPECT_GT(moved_in(given), 0.0);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(given[i].loss, expected[i].loss, kSumParity * expected[i].loss) << i;
  }
  // Adam divides by the root of tiny moments: a few roundings are amplified.
  constexpr double kWeightParity = 1e-9;
  EXPECT_LE(largest_difference(folder.file("model"), folder.file("one-model")), kWeightParity);
}

/// A router that favours the experts of one member; the same tokens every step, nothing learnt.
TEST(ExpertReplan, SkewedLoadsEvenOutAsPlanned) {
  const TemporaryFolder folder;
  const model::ModelConfig model = deepseek();
  const auto table = model::parameter_table(model, {0, model.layers}, true, true);
  at::Tensor values = at::empty({table.elements}, at::kDouble);
  model::initialize_(values, table, 0.2, 9);
  for (const model::ParameterSpec& spec : table.parameters) {
    if (!spec.counts_choices) continue;
    for (const std::int64_t expert : {0, 1, 2}) values[spec.offset + expert].fill_(0.4);
  }
  model::save_pretrained(folder.file("model"), model, table, values, {.dtype = at::kDouble});
  std::vector<data::Document> documents(8);
  for (std::size_t d = 0; d < documents.size(); ++d) {
    for (std::size_t t = 0; t < 32; ++t) {
      documents[d].tokens.push_back(static_cast<std::int32_t>((7 * t * t + 11 * d + t) % 64));
    }
  }
  for (const int ep : {2, 4}) {
    TrainConfig config = config_of(folder.file("run"), {{.hdp = 4, .ep = ep}}, 6, 3);
    config.model.path = folder.file("model");
    config.optimizer.lr = 0.0;
    config.bias_update_speed = 0.0;
    std::vector<StepMetrics> steps;
    on_ranks(
        config, model,
        [&](Trainer& trainer, int rank) {
          while (!trainer.finished()) {
            const StepMetrics metrics = trainer.step();
            if (rank == 0) steps.push_back(metrics);
          }
        },
        documents);
    const auto imbalance = [&](std::size_t step) {
      return steps.at(step).extra.at("expert_rank_imbalance");
    };
    const double before = steps[2].extra.at("expert_rank_imbalance_before");
    const double planned = steps[2].extra.at("expert_rank_imbalance_planned");
    EXPECT_DOUBLE_EQ(before, imbalance(2));
    EXPECT_GT(before, 1.3) << "not skewed";
    EXPECT_LT(planned, before - 0.2);
    EXPECT_GT(steps[2].extra.at("experts_moved"), 0.0);
    EXPECT_GT(steps[2].traffic.at("experts").inside_bytes, 0);
    for (std::size_t step = 0; step < 6; ++step) {
      EXPECT_DOUBLE_EQ(imbalance(step), step < 3 ? before : planned) << step;
    }
    // The second decision finds nothing to gain.
    EXPECT_EQ(steps[5].extra.at("experts_moved"), 0.0);
    EXPECT_DOUBLE_EQ(steps[5].extra.at("expert_rank_imbalance_before"), planned);
    EXPECT_EQ(steps[5].traffic.at("experts").inside_bytes, 0);
  }
}

TEST(ExpertLoads, LayersThatGainLittleStay) {
  model::ModelConfig model = qwen();
  const std::vector<parallel::ExpertMap> maps(3, parallel::ExpertMap::even(8, 2));
  // Layer 0: 22 against 18 becomes 20 each, a gain of 1/11; layer 2: 28 against 12, of 2/7.
  const detail::ExpertCounts counts{6, 6, 5, 5, 5, 5, 4, 4, 0, 0, 0, 0,
                                    0, 0, 0, 0, 7, 7, 7, 7, 3, 3, 3, 3};
  for (const auto& [least, moves] :
       std::vector<std::pair<double, int>>{{0.0, 6}, {0.05, 6}, {0.2, 4}, {0.5, 0}}) {
    detail::ExpertLoads loads(model, 1, least);
    loads.add(counts);
    loads.add(counts);
    const auto decision = loads.decide(maps);
    EXPECT_EQ(decision.moved, moves) << least;
    EXPECT_DOUBLE_EQ(decision.before, (22.0 / 20.0 + 28.0 / 20.0) / 2.0);
    EXPECT_LE(decision.after, decision.before);
    EXPECT_EQ(decision.maps[1], maps[1]) << "a dense layer";
    EXPECT_TRUE(loads.empty());
  }
}

TEST(ExpertLoads, DamagedPlacementsOfCheckpointsAreNamed) {
  const std::vector<parallel::ExpertMap> even(3, parallel::ExpertMap::even(4, 2));
  std::vector<parallel::ExpertMap> moved = even;
  moved[1] = even[1].rearranged({3, 1, 2, 0});
  const std::string text = detail::experts_text(moved, {1.0, 2.0});
  const auto saved = detail::parse_experts(text, even);
  EXPECT_EQ(saved.maps, moved);
  EXPECT_EQ(saved.loads, (detail::ExpertCounts{1.0, 2.0}));
  EXPECT_EQ(detail::parse_experts({}, even).maps, even);
  const std::vector<parallel::ExpertMap> other(3, parallel::ExpertMap::even(4, 4));
  EXPECT_EQ(detail::parse_experts(text, other).maps, other);
  for (const char* damaged :
       {"{", R"({"loads": []})", R"({"loads": [], "members": 2, "places": [[0, 1, 2, 2]]})"}) {
    EXPECT_NE(message_of<DataError>([&] {
                (void)detail::parse_experts(damaged, even);
              }).find("placement of experts"),
              std::string::npos);
  }
  detail::ExpertLoads loads(qwen(), 1, 0.0);
  EXPECT_NE(message_of<DataError>([&] { loads.restore({1.0}); }).find("has 24"), std::string::npos);
}

TEST(ExpertReplan, SettingsThatDoNotFitAreRefused) {
  const TemporaryFolder folder;
  const auto message = [&](const Spread& run, const model::ModelConfig& model) {
    return message_of<InvalidArgument>(
        [&] { on_ranks(config_of(folder.file("run"), run, 1, 5), model, [](Trainer&, int) {}); });
  };
  EXPECT_NE(message({{.hdp = 2}}, qwen())
                .find("parallel.experts.replan_every is 5, but layout hdp=2 has all"),
            std::string::npos);
  EXPECT_NE(message({{.hdp = 2}}, tiny_dense()).find("the llama model has no experts"),
            std::string::npos);
  const auto yaml = [](const std::string& experts) {
    return message_of<DataError>([&] {
      (void)TrainConfig::from_yaml("global_batch_tokens: 8\nparallel: {experts: " + experts + "}\n",
                                   "c.yaml");
    });
  };
  EXPECT_NE(yaml("{replan_every: -1}").find("c.yaml:2: parallel.experts.replan_every: got -1"),
            std::string::npos);
  EXPECT_NE(
      yaml("{least_gain: 1.0}").find("parallel.experts.least_gain: got 1, expected 0 <= x < 1"),
      std::string::npos);
  EXPECT_NE(yaml("{every: 1}").find("every"), std::string::npos);
}

}  // namespace
}  // namespace meshloom::train::expert_replan
