// Tensor, pipeline, expert, HDP and optimizer-state parallelism, composed: loss and every gradient
// as on one rank.

#include <gtest/gtest.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "layout_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::parallel::sweep {
namespace {

/// Four layers, tied embeddings, one K/V head for two tensor-parallel ranks, sizes that two does
/// not divide.
const char* const kDeepDense = R"({
  "model_type": "llama", "vocab_size": 53, "hidden_size": 24, "intermediate_size": 37,
  "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
  "attention_bias": true, "mlp_bias": true,
  "tie_word_embeddings": true, "initializer_range": 0.2})";

/// Four layers, one of them dense, q/k norms, four experts.
const char* const kDeepMoe = R"({
  "model_type": "qwen3_moe", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 23,
  "moe_intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
  "norm_topk_prob": true, "mlp_only_layers": [1], "attention_bias": true,
  "initializer_range": 0.2})";

/// One cell of the matrix.
struct Cell {
  Layout layout;
  int zero = 1;
  std::string schedule{};
  std::vector<int> split{};
  const char* config = kDeepMoe;
  model::Recompute recompute = model::Recompute::kNone;
};

std::string name_of(const Cell& cell) {
  return cell.layout.to_string() + " zero " + std::to_string(cell.zero) + " " + cell.schedule +
         (cell.config == kDeepMoe ? " moe" : " dense") + " recompute " +
         std::to_string(static_cast<int>(cell.recompute));
}

/// Units of one, two, three and all ranks, with idle ranks.
plan::StepPlan plan_of(const Cell& cell, const std::vector<model::Document>& texts) {
  plan::PlanProblem problem = problem_of(texts, cell.layout);
  if (cell.zero > 1) problem.lockstep = plan::Lockstep::kHdp;
  return plan::make_plan(problem, "balanced");
}

void run_cell(const Cell& cell) {
  SCOPED_TRACE(name_of(cell));
  const bool moe = cell.config == kDeepMoe;
  Setting setting{.config = cell.config,
                  .zero = parse_zero(cell.zero),
                  .schedule = cell.schedule,
                  .split = cell.split,
                  .recompute = cell.recompute};
  if (moe) {
    setting.balance = cell.layout.pp % 2 == 0 ? "sequence" : "global";
    setting.z_loss = 0.02;
  }
  const auto texts = documents(cell.layout.hdp, moe ? 61 : 53);
  const auto plan = plan_of(cell, texts);
  const auto expected = solve_alone(setting, texts);
  std::mutex mutex;
  comm::run_thread_ranks(cell.layout.world_size(), [&](comm::Communicator world) {
    const auto wrong = run_and_compare(setting, plan, texts, expected, world);
    const std::lock_guard lock(mutex);
    EXPECT_EQ(wrong, "") << "rank " << world.rank() << " of " << world.size();
  });
}

TEST(FiveDimensions, MoreTensorParallelRanksThanKeyValueHeadsEqualOneRank) {
  for (const char* config : {kDeepDense, kDeepMoe}) {
    run_cell({.layout = {.tp = 4}, .config = config});
    run_cell({.layout = {.tp = 4, .hdp = 2}, .zero = 3, .config = config});
  }
}

TEST(FiveDimensions, OneLayerAStageEqualsOneRank) {
  for (const char* config : {kDeepDense, kDeepMoe}) {
    for (const char* schedule : {"1f1b", "zb_h1"}) {
      run_cell({.layout = {.hdp = 2, .pp = 4}, .schedule = schedule, .config = config});
    }
    run_cell({.layout = {.chunks = 2}, .config = config});
  }
}

/// Pipelines of a stage count: chunks, schedule, layers of each piece.
struct Pipeline {
  int chunks = 1;
  std::string schedule{};
  std::vector<int> split{};
};

std::vector<Pipeline> pipelines_of(int pp) {
  if (pp == 1) return {{}};
  std::vector<Pipeline> result{{1, "1f1b"}, {1, "zb_h1"}};
  if (pp == 2) {
    result.push_back({2, "interleaved_1f1b"});
    result.push_back({2, "zb_v"});
  } else {
    result[1].split = {1, 3, 0};
    result.push_back({2, "interleaved_1f1b", {1, 1, 0, 1, 1, 0}});
    result.push_back({2, "zb_v", {0, 1, 1, 1, 0, 1}});
  }
  return result;
}

/// tp {1, 2} x pp {1, 2, 3} x hdp {1, 2, 3, 4} x ep {1, 2} x ZeRO {1, 2, 3} x schedule: all that
/// fits 8 ranks, with the three ways of recomputing in turn, or each of them in the full run.
TEST(FiveDimensions, EveryCellOfTheMatrixEqualsOneRank) {
  const bool full = std::getenv("MESHLOOM_FULL") != nullptr;
  const std::vector<model::Recompute> ways{model::Recompute::kNone, model::Recompute::kSelective,
                                           model::Recompute::kFull};
  int cells = 0;
  for (const char* config : {kDeepDense, kDeepMoe}) {
    for (const int tp : {1, 2}) {
      for (const int pp : {1, 2, 3}) {
        for (const int hdp : {1, 2, 3, 4}) {
          for (const int ep : {1, 2}) {
            if (tp * pp * hdp > 8 || hdp % ep != 0) continue;
            for (const Pipeline& pipeline : pipelines_of(pp)) {
              for (const int zero : {1, 2, 3}) {
                // In turn, so that every way meets every level of ZeRO.
                const int turn = cells / 3 + cells;
                for (const auto recompute : ways) {
                  if (!full && recompute != ways[static_cast<std::size_t>(turn) % ways.size()]) {
                    continue;
                  }
                  run_cell(
                      {.layout =
                           {.tp = tp, .hdp = hdp, .pp = pp, .ep = ep, .chunks = pipeline.chunks},
                       .zero = zero,
                       .schedule = pipeline.schedule,
                       .split = pipeline.split,
                       .config = config,
                       .recompute = recompute});
                }
                ++cells;
              }
            }
          }
        }
      }
    }
  }
  RecordProperty("cells", cells);
  EXPECT_GT(cells, 300);
}

}  // namespace
}  // namespace meshloom::parallel::sweep
