// Tensor, pipeline, expert, HDP and optimizer-state parallelism, composed: loss and every gradient
// as on one rank.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "layout_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/plan/program.h"
#include "rank_run.h"

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

/// Latent attention, grouped routing with a correction bias, a shared expert, a dense layer first.
const char* const kDeepLatent = R"({
  "model_type": "deepseek_v3", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24,
  "num_hidden_layers": 4, "num_attention_heads": 4, "first_k_dense_replace": 1,
  "initializer_range": 0.2, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6,
  "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 6, "n_group": 3, "topk_group": 2,
  "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1})";

/// One cell of the matrix.
struct Cell {
  Layout layout;
  int zero = 1;
  std::string schedule{};
  std::vector<int> split{};
  const char* config = kDeepMoe;
  model::Recompute recompute = model::Recompute::kNone;
  int ranks_per_node = 0;
  plan::Exchange exchange = plan::Exchange::kRing;
};

std::string name_of(const Cell& cell) {
  return cell.layout.to_string() + " zero " + std::to_string(cell.zero) + " " + cell.schedule +
         (cell.config == kDeepMoe ? " moe" : " dense") + " recompute " +
         std::to_string(static_cast<int>(cell.recompute)) + " nodes of " +
         std::to_string(cell.ranks_per_node);
}

/// Units of one, two, three and all ranks, with idle ranks.
plan::StepPlan plan_of(const Cell& cell, const std::vector<model::Document>& texts) {
  plan::PlanProblem problem = problem_of(texts, cell.layout);
  if (cell.zero > 1) problem.lockstep = plan::Lockstep::kHdp;
  plan::StepPlan plan = plan::make_plan(problem, "balanced");
  for (plan::Slot& slot : plan.slots) {
    for (plan::Unit& unit : slot.units) {
      if (unit.ranks.size() > 1) unit.exchange = cell.exchange;
    }
  }
  return plan;
}

void run_cell(const Cell& cell) {
  SCOPED_TRACE(name_of(cell));
  const bool moe = cell.config == kDeepMoe;
  Setting setting{.config = cell.config,
                  .zero = parse_zero(cell.zero),
                  .schedule = cell.schedule,
                  .split = cell.split,
                  .recompute = cell.recompute,
                  .ranks_per_node = cell.ranks_per_node};
  if (moe) {
    setting.balance = cell.layout.pp % 2 == 0 ? "sequence" : "global";
    setting.z_loss = 0.02;
  }
  const auto texts =
      documents(cell.layout.hdp, model::ModelConfig::from_json(cell.config).vocab_size);
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

TEST(FiveDimensions, LatentAttentionEqualsOneRank) {
  for (const Cell& cell : std::vector<Cell>{
           {.layout = {.hdp = 3}},
           {.layout = {.hdp = 4, .ep = 2}, .zero = 3},
           {.layout = {.hdp = 2}, .zero = 2, .recompute = model::Recompute::kFull},
           {.layout = {.tp = 2}, .zero = 1},
           {.layout = {.tp = 4, .hdp = 2}, .zero = 3, .recompute = model::Recompute::kSelective},
           {.layout = {.tp = 2, .hdp = 2, .pp = 2, .ep = 2}, .schedule = "zb_h1"},
           {.layout = {.hdp = 2, .pp = 2, .ep = 2}, .schedule = "zb_h1"},
           {.layout = {.hdp = 2, .pp = 2, .chunks = 2},
           .zero = 3,
           .schedule = "zb_v",
           .recompute = model::Recompute::kSelective}}) {
    Cell latent = cell;
    latent.config = kDeepLatent;
    for (const auto exchange : {plan::Exchange::kRing, plan::Exchange::kAllGather}) {
      latent.exchange = exchange;
      run_cell(latent);
    }
  }
}

/// All forwards, then all backwards from the last on: nothing of the built-in schedules.
TEST(FiveDimensions, AnOwnTableEqualsOneRank) {
  for (const char* config : {kDeepDense, kDeepMoe}) {
    const Cell cell{.layout = {.hdp = 2, .pp = 2}, .config = config};
    const auto texts = documents(2, model::ModelConfig::from_json(config).vocab_size);
    const auto plan = plan_of(cell, texts);
    const auto slots = static_cast<int>(plan.slots.size());
    plan::Schedule table{.placement = {{0, 0}, {1, 0}}};
    for (int stage = 0; stage < 2; ++stage) {
      auto& actions = table.stages.emplace_back();
      for (int slot = 0; slot < slots; ++slot) {
        actions.push_back({.op = plan::Op::kForward, .slot = slot});
      }
      for (int slot = slots; slot-- > 0;) {
        actions.push_back({.op = plan::Op::kBackward, .slot = slot});
      }
    }
    const Setting setting{.config = config,
                          .table = std::make_shared<const plan::Schedule>(std::move(table))};
    const auto expected = solve_alone(setting, texts);
    std::mutex mutex;
    comm::run_thread_ranks(4, [&](comm::Communicator world) {
      const auto wrong = run_and_compare(setting, plan, texts, expected, world);
      const std::lock_guard lock(mutex);
      EXPECT_EQ(wrong, "") << "rank " << world.rank();
    });
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

std::int64_t sent(const comm::Communicator& group, const char* purpose) {
  const auto traffic = group.traffic();
  const auto found = traffic.find(purpose);
  return found == traffic.end() ? 0 : found->second.sent_bytes;
}

/// docs/layouts.md, Bytes: what one rank sends in a step, by kind, in fp64.
void expect_closed_forms(const Cell& cell) {
  SCOPED_TRACE(name_of(cell));
  constexpr std::int64_t kBytes = 8;
  const auto config = model::ModelConfig::from_json(cell.config);
  const auto texts = documents(cell.layout.hdp, config.vocab_size);
  const auto plan = plan_of(cell, texts);
  auto placement =
      place_model(config, cell.layout, cell.schedule, cell.split, parse_zero(cell.zero));
  placement.ranks_per_node = cell.ranks_per_node;
  const plan::CompileOptions compile{.layers = static_cast<int>(config.layers),
                                     .schedule = cell.schedule,
                                     .split = placement.split};
  std::mutex mutex;
  comm::run_thread_ranks(cell.layout.world_size(), [&](comm::Communicator world) {
    ExecutorOptions options;
    options.recompute = cell.recompute;
    RankRun rank(world, placement, at::kDouble, options);
    (void)rank.executor.run(plan, plan::compile_rank(plan, compile, world.rank()), loader_of(texts),
                            rank.state, nullptr, [] {});
    const std::lock_guard lock(mutex);
    const Coordinates at = rank.groups.at();
    const int tp = cell.layout.tp;
    std::int64_t gradients = 0;
    std::int64_t parameters = 0;
    std::int64_t crossing = 0;  // from one node to another, where sums have two levels
    const auto slots = std::ssize(plan.slots);  // sharded states run in lockstep
    for (const auto& part : rank.state.parts()) {
      const auto replicas = std::ssize(part.place.replicas.ranks);
      const std::int64_t all = part.space.table().elements;
      const std::int64_t own = part.space.own_range().size();
      const Zero zero = part.space.zero();
      gradients += (all - own) * kBytes * (zero == Zero::kOptimizer ? 1 : slots);
      // An embedding is read in forward, and once more where it is the head, too.
      const bool read_once = part.place.last_layer < 0 && cell.layout.pp > 1;
      const auto reads = zero == Zero::kParameters ? (read_once ? slots : 2 * slots) : 1;
      const std::int64_t nodes = part.place.replicas.nodes;
      const std::int64_t places = replicas / nodes;
      const std::int64_t place = rank.groups.replicas(part.place.set).position() / nodes;
      const std::int64_t block =  // what the ranks of this place own together
          all * (place + 1) / places - all * place / places;
      parameters += (own * (nodes - 1) + block * (places - 1)) * kBytes * reads;
      if (nodes > 1) {
        crossing += (block - own) * kBytes * (zero == Zero::kOptimizer ? 1 : slots);
        crossing += own * (nodes - 1) * kBytes * reads;
      }
    }
    std::int64_t tensor = 0;
    std::int64_t pipeline = 0;
    const ChunkPlace chunk = placement.chunks(at.pp).front();
    const std::int64_t layers = chunk.layers.second - chunk.layers.first;  // dense ones
    for (const auto& slot : plan.slots) {
      for (const auto& unit : slot.units) {
        const auto member = std::find(unit.ranks.begin(), unit.ranks.end(), at.hdp);
        if (member == unit.ranks.end()) continue;
        const int index = static_cast<int>(member - unit.ranks.begin());
        const std::int64_t tokens = member_tokens(plan, unit, index);
        const auto [begin, end] = model::shard_range(tokens, {.rank = at.tp, .ranks = tp});
        const std::int64_t row = config.hidden_size * kBytes;
        const std::int64_t gather = (end - begin) * (tp - 1) * row;
        const std::int64_t scatter = (tokens - (end - begin)) * row;
        if (tp > 1) {
          tensor += layers * (6 * gather + 4 * scatter);
          if (cell.recompute == model::Recompute::kSelective) tensor += layers * gather;
          if (cell.recompute == model::Recompute::kFull) tensor += layers * 2 * (gather + scatter);
          if (chunk.with_embedding) tensor += gather + scatter;
          if (chunk.with_head) {
            const auto batch = build_batch(plan, unit, index, loader_of(texts), at::kCPU);
            const auto targets = batch.labels.ne(model::kIgnoreLabel).sum().item<std::int64_t>();
            tensor += gather + scatter + 2 * targets * kBytes * (tp - 1);
          }
        }
        if (!chunk.with_embedding) pipeline += (end - begin) * row;
        if (!chunk.with_head) pipeline += (end - begin) * row;
      }
    }
    std::int64_t gradients_sent = 0;
    std::int64_t parameters_sent = 0;
    std::int64_t crossed = 0;
    for (const auto set :
         {ReplicaSet::kDense, ReplicaSet::kReplicated, ReplicaSet::kKeyValue, ReplicaSet::kTied}) {
      if (std::none_of(rank.state.parts().begin(), rank.state.parts().end(),
                       [&](const auto& part) { return part.place.set == set; })) {
        continue;
      }
      for (const auto& group : rank.groups.replicas(set).groups()) {
        gradients_sent += sent(group, "gradients");
        parameters_sent += sent(group, "parameters");
        if (group.name().ends_with("_across")) {
          crossed += sent(group, "gradients") + sent(group, "parameters");
        }
      }
    }
    EXPECT_EQ(crossed, crossing);
    EXPECT_EQ(gradients_sent, gradients);
    EXPECT_EQ(parameters_sent, parameters);
    if (tp > 1) {
      EXPECT_EQ(sent(rank.groups.tensor(), "tensor"), tensor);
    }
    if (cell.layout.pp > 1) {
      EXPECT_EQ(sent(rank.groups.pipeline(), "pipeline"), pipeline);
    }
  });
}

TEST(FiveDimensions, BytesAreTheClosedForms) {
  for (const int zero : {1, 2, 3}) {
    expect_closed_forms({.layout = {.hdp = 3}, .zero = zero, .config = kDeepDense});
    expect_closed_forms(
        {.layout = {.tp = 2, .hdp = 2, .pp = 2}, .zero = zero, .config = kDeepDense});
  }
  expect_closed_forms({.layout = {.tp = 4}, .config = kDeepDense});
  for (const auto recompute : {model::Recompute::kSelective, model::Recompute::kFull}) {
    expect_closed_forms(
        {.layout = {.tp = 2, .hdp = 2}, .zero = 3, .config = kDeepDense, .recompute = recompute});
  }
}

/// Two and four nodes; what fills them evenly goes in two levels.
TEST(FiveDimensions, SumsInsideAndAcrossNodesEqualOneRank) {
  for (const int zero : {1, 2, 3}) {
    for (const Cell& cell : std::vector<Cell>{
             {.layout = {.hdp = 8}, .ranks_per_node = 4},
             {.layout = {.hdp = 8}, .ranks_per_node = 2},
             {.layout = {.hdp = 8, .ep = 2}, .ranks_per_node = 4},
             {.layout = {.tp = 2, .hdp = 4}, .config = kDeepDense, .ranks_per_node = 4},
             {.layout = {.hdp = 4, .pp = 2}, .config = kDeepDense, .ranks_per_node = 2},
             {.layout = {.hdp = 6}, .config = kDeepDense, .ranks_per_node = 3}}) {
      Cell sharded = cell;
      sharded.zero = zero;
      run_cell(sharded);
      if (cell.config == kDeepDense) expect_closed_forms(sharded);
    }
  }
}

}  // namespace
}  // namespace meshloom::parallel::sweep
