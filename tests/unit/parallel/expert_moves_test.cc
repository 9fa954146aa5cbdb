// Experts that move between ranks: every state follows, nothing else changes.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "layout_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/parallel/model_state.h"
#include "meshloom/plan/expert_replan.h"
#include "rank_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::parallel::expert_moves {
namespace {

/// Three layers, the middle one dense; seven experts, which no number of ranks shares evenly.
constexpr const char* kSeven = R"({
  "model_type": "qwen3_moe", "vocab_size": 59, "hidden_size": 16, "intermediate_size": 24,
  "moe_intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 8, "num_experts": 7, "num_experts_per_tok": 2,
  "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [1],
  "tie_word_embeddings": true, "initializer_range": 0.2, "router_aux_loss_coef": 0.0})";

struct Spread {
  Layout layout;
  Zero zero = Zero::kOptimizer;
  at::ScalarType dtype = at::kFloat;
  int ranks_per_node = 0;
};

ModelPlacement placed(const model::ModelConfig& config, const Spread& run) {
  ModelPlacement result = place_model(config, run.layout, {}, {}, run.zero);
  result.ranks_per_node = run.ranks_per_node;
  return result;
}

std::string text_of(const Spread& run) {
  return run.layout.to_string() + ", zero " + std::to_string(static_cast<int>(run.zero)) + ", " +
         c10::toString(run.dtype);
}

std::vector<Spread> spreads() {
  return {
      {{.hdp = 2, .ep = 2}},
      {{.hdp = 4, .ep = 2}, Zero::kGradients},
      {{.hdp = 4, .ep = 2}, Zero::kParameters, at::kBFloat16},
      {{.hdp = 6, .ep = 2}, Zero::kParameters},
      {{.hdp = 4, .ep = 4}, Zero::kOptimizer, at::kBFloat16},
      {{.hdp = 8, .ep = 4}, Zero::kOptimizer, at::kDouble},
      {{.tp = 2, .hdp = 2, .pp = 2, .ep = 2}, Zero::kOptimizer, at::kBFloat16},
      {{.tp = 2, .hdp = 2, .pp = 2, .ep = 2}, Zero::kParameters},
      {{.hdp = 4, .pp = 2, .ep = 4}, Zero::kGradients},
      {{.hdp = 8, .ep = 8}},  // one member holds none
      {{.hdp = 8, .ep = 2}, Zero::kParameters, at::kFloat, 4},
      {{.tp = 2, .hdp = 4, .ep = 2}, Zero::kOptimizer, at::kBFloat16, 4},
  };
}

/// Another order of each layer's experts.
std::vector<ExpertMap> shuffled(const std::vector<ExpertMap>& maps, std::uint64_t seed) {
  std::vector<ExpertMap> result;
  for (std::size_t layer = 0; layer < maps.size(); ++layer) {
    std::vector<std::int64_t> experts(static_cast<std::size_t>(maps[layer].experts()));
    std::iota(experts.begin(), experts.end(), 0);
    std::sort(experts.begin(), experts.end(), [&](std::int64_t a, std::int64_t b) {
      const std::uint64_t key = random_key("order", seed + layer);
      return random_bits(key, static_cast<std::uint64_t>(a)) <
             random_bits(key, static_cast<std::uint64_t>(b));
    });
    result.push_back(maps[layer].rearranged(std::move(experts)));
  }
  return result;
}

/// As a re-plan by uneven loads has them: who stays with a member keeps its place.
std::vector<ExpertMap> replanned(const std::vector<ExpertMap>& maps) {
  std::vector<ExpertMap> result;
  for (const ExpertMap& map : maps) {
    plan::HeldExperts now;
    now.expert.assign(map.by_place().begin(), map.by_place().end());
    for (int member = 0; member < map.ranks(); ++member) {
      now.held.push_back(static_cast<int>(map.experts_of(member).size()));
    }
    const std::vector<int> next =
        plan::replan_experts(std::vector<double>{9, 8, 7, 6, 1, 2, 1}, now);
    result.push_back(map.rearranged({next.begin(), next.end()}));
  }
  return result;
}

/// Values that tell their seed, parameter and element.
at::Tensor signature(const model::ParameterTable& table, std::uint64_t seed, at::ScalarType dtype) {
  at::Tensor values = at::empty({table.elements}, dtype);
  model::initialize_(values, table, 1.0, seed);
  return values;
}

enum : std::uint64_t { kMaster = 1, kFirst = 2, kSecond = 3 };

at::Tensor own_signature(const ShardedSpace& space, std::uint64_t seed) {
  return signature(space.table(), seed, space.master().scalar_type())
      .narrow(0, space.own_range().begin, space.own_range().size());
}

using Moments = std::vector<std::vector<at::Tensor>>;

void expect_in_place(ModelState& state, const Moments& moments) {
  for (std::size_t p = 0; p < moments.size(); ++p) {
    ShardedSpace& space = state.parts()[p].space;
    EXPECT_TRUE(at::equal(space.master(), own_signature(space, kMaster)));
    EXPECT_TRUE(at::equal(moments[p][0], own_signature(space, kFirst)));
    EXPECT_TRUE(at::equal(moments[p][1], own_signature(space, kSecond)));
    const at::Tensor values = signature(space.table(), kMaster, space.master().scalar_type());
    if (space.zero() == Zero::kParameters) continue;
    EXPECT_TRUE(at::equal(space.values(), values.to(state.compute())));
  }
}

TEST(ExpertMoves, EveryStateFollowsItsExpert) {
  const auto config = model::ModelConfig::from_json(kSeven);
  for (const Spread& run : spreads()) {
    SCOPED_TRACE(text_of(run));
    const ModelPlacement placement = placed(config, run);
    comm::run_thread_ranks(run.layout.world_size(), [&](comm::Communicator world) {
      Groups groups(world, placement);
      ModelState state(placement, groups, run.dtype, at::kCPU);
      state.assign([](const model::ParameterTable& table, at::Tensor& values) {
        values.copy_(signature(table, kMaster, values.scalar_type()));
      });
      Moments moments;
      for (const ModelState::Part& part : state.parts()) {
        moments.push_back({own_signature(part.space, kFirst).clone(),
                           own_signature(part.space, kSecond).clone()});
      }
      const at::Tensor before = state.whole_values();
      for (const std::uint64_t seed : {5U, 6U}) {
        const std::vector<ExpertMap> next = shuffled(placement.experts, seed);
        state.move_experts(next, moments);
        EXPECT_EQ(state.experts(), next);
        expect_in_place(state, moments);
      }
      state.move_experts(placement.experts, moments);
      expect_in_place(state, moments);
      const at::Tensor after = state.whole_values();
      if (world.rank() == 0) {
        EXPECT_TRUE(at::equal(before, after));
      }
    });
  }
}

/// docs/layouts.md: a moved expert's values once a replica that keeps them whole, its masters where
/// they are not those values, its moments once; what stays sends nothing.
TEST(ExpertMoves, TrafficIsTheClosedForm) {
  const auto config = model::ModelConfig::from_json(kSeven);
  const std::int64_t expert = 3 * config.hidden_size * config.moe.intermediate_size;
  for (const Spread& run : spreads()) {
    SCOPED_TRACE(text_of(run));
    const ModelPlacement placement = placed(config, run);
    const std::vector<ExpertMap> next = replanned(placement.experts);
    std::int64_t moved = 0;
    for (const std::size_t layer : {0U, 2U}) {
      for (std::int64_t e = 0; e < config.moe.experts; ++e) {
        moved += next[layer].owner(e) != placement.experts[layer].owner(e) ? 1 : 0;
      }
    }
    ASSERT_TRUE(moved > 0 || run.layout.ep == 8) << "one expert a member at most";
    const std::int64_t replicas = run.layout.hdp / run.layout.ep * run.layout.tp;
    const std::int64_t element = static_cast<std::int64_t>(c10::elementSize(run.dtype));
    const std::int64_t master = std::max<std::int64_t>(4, element);
    const bool sharded = run.zero == Zero::kParameters && replicas > 1;
    const std::int64_t bytes = (sharded ? 0 : replicas * element) +
                               (sharded || master != element ? master : 0) + 2 * master;
    std::mutex mutex;
    std::int64_t sent = 0;
    comm::run_thread_ranks(run.layout.world_size(), [&](comm::Communicator world) {
      Groups groups(world, placement);
      ModelState state(placement, groups, run.dtype, at::kCPU);
      Moments moments;
      for (const ModelState::Part& part : state.parts()) {
        moments.push_back({part.space.master().clone(), part.space.master().clone()});
      }
      state.move_experts(placement.experts, moments);
      EXPECT_EQ(world.traffic().count("experts"), 0U);
      state.move_experts(next, moments);
      const comm::Traffic traffic = world.traffic();
      const auto found = traffic.find("experts");
      const std::lock_guard lock(mutex);
      if (found != traffic.end()) sent += found->second.sent_bytes;
    });
    EXPECT_EQ(sent, moved * expert * bytes);
  }
}

/// One step's loss and gradients are the same bits wherever experts are.
TEST(ExpertMoves, GradientsAreTheSameBits) {
  const auto config = model::ModelConfig::from_json(kSeven);
  for (const Spread& run : std::vector<Spread>{{{.hdp = 2, .ep = 2}},
                                               {{.hdp = 4, .ep = 2}, Zero::kGradients},
                                               {{.hdp = 4, .ep = 4}},
                                               {{.tp = 2, .hdp = 2, .pp = 2, .ep = 2}},
                                               {{.hdp = 4, .pp = 2, .ep = 2}, Zero::kParameters}}) {
    SCOPED_TRACE(text_of(run));
    const auto documents = sweep::documents(run.layout.hdp, config.vocab_size);
    plan::PlanProblem problem = sweep::problem_of(documents, run.layout);
    if (run.zero != Zero::kOptimizer) problem.lockstep = plan::Lockstep::kHdp;
    const plan::StepPlan plan = plan::make_plan(problem, "balanced");
    const auto programs = plan::compile(plan, {.layers = static_cast<int>(config.layers)});
    comm::run_thread_ranks(run.layout.world_size(), [&](comm::Communicator world) {
      RankRun rank(world, placed(config, run), at::kDouble);
      const auto step = [&] {
        const StepOutcome outcome =
            rank.executor.run(plan, programs[static_cast<std::size_t>(world.rank())],
                              sweep::loader_of(documents), rank.state, nullptr, [] {});
        return std::pair(outcome.loss_sum, rank.state.whole_gradients());
      };
      const auto [loss, gradients] = step();
      const std::vector<ExpertMap> next = shuffled(rank.placement.experts, 21);
      rank.state.move_experts(next, Moments(rank.state.parts().size()));
      const auto [loss_then, gradients_then] = step();
      EXPECT_EQ(loss_then, loss);
      EXPECT_TRUE(at::equal(gradients_then, gradients));
    });
  }
}

TEST(ExpertMoves, MapsThatDoNotFitAreRefusedBeforeAnythingMoves) {
  const auto config = model::ModelConfig::from_json(kSeven);
  const ModelPlacement placement = place_model(config, {.hdp = 2, .ep = 2});
  comm::run_thread_ranks(2, [&](comm::Communicator world) {
    Groups groups(world, placement);
    ModelState state(placement, groups, at::kFloat, at::kCPU);
    const Moments none(state.parts().size());
    const auto message = [&](const std::vector<ExpertMap>& next, const Moments& moments) {
      return message_of<InvalidArgument>([&] { state.move_experts(next, moments); });
    };
    std::vector<ExpertMap> next = placement.experts;
    next[2] = ExpertMap({0, 0, 0, 0, 0, 1, 1}, 2);
    EXPECT_NE(message(next, none).find("layer 2: members are to hold other numbers"),
              std::string::npos);
    EXPECT_NE(message({next[0]}, none).find("layers that experts are placed for"),
              std::string::npos);
    EXPECT_NE(message(placement.experts, {}).find("parts that something is kept for"),
              std::string::npos);
    EXPECT_EQ(state.experts(), placement.experts);
  });
}

}  // namespace
}  // namespace meshloom::parallel::expert_moves
