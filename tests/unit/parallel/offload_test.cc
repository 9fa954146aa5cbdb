// Activations that leave for host memory and come back: gradients bit by bit as without, what is
// held as the memory model says, and what happens where the file system says no.

#include "meshloom/parallel/activation_offload.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/model/config.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"
#include "rank_run.h"
#include "unit/model/file_limit.h"
#include "unit/temporary_folder.h"

namespace meshloom::parallel::offload_test {
namespace {

using model::Activation;
using model::Recompute;

/// A model of one family; by default just wide enough that a quarter of a saved tensor has whole
/// pages.
std::string config_of(const std::string& family, const std::string& more = {}, int layers = 4,
                      int width = 32) {
  return R"({"model_type": ")" + family + R"(", "num_hidden_layers": )" + std::to_string(layers) +
         R"(, "vocab_size": 61, "hidden_size": )" + std::to_string(width) +
         R"(, "intermediate_size": )" + std::to_string(3 * width / 2) +
         R"(, "num_attention_heads": 4, "initializer_range": 0.2)" + more + "}";
}

std::string grouped(const std::string& more) { return R"(, "num_key_value_heads": 2)" + more; }

/// Every family that is built.
std::vector<std::string> families() {
  return {
      config_of("llama", grouped(R"(, "attention_bias": true, "tie_word_embeddings": true)")),
      config_of("mistral", grouped(R"(, "sliding_window": 50)")),
      config_of("qwen2", grouped("")),
      config_of("qwen3", grouped(R"(, "head_dim": 8)")),
      config_of("mixtral", grouped(R"(, "num_local_experts": 4, "num_experts_per_tok": 2)")),
      config_of("qwen3_moe",
                grouped(R"(, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4,
                        "num_experts_per_tok": 2, "mlp_only_layers": [1])")),
      config_of("deepseek_v3", R"(, "first_k_dense_replace": 1, "q_lora_rank": 24,
                "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
                "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
                "moe_intermediate_size": 24, "n_shared_experts": 1)"),
  };
}

/// One way of running a step.
struct Way {
  std::string config;
  Layout layout{};
  int zero = 1;
  std::string schedule{};
  Recompute recompute = Recompute::kNone;
  int resident_layers = 1;
  std::vector<std::int64_t> lengths{620, 80, 260, 14, 520, 180, 560};
  std::int64_t capacity = 640;
  std::string folder{};
};

/// All ranks' results of one step.
struct Result {
  at::Tensor gradients;  ///< of the whole model
  double loss_sum = 0.0;
  std::vector<OffloadOutcome> offload;  ///< [rank]
};

plan::StepPlan plan_of(const Way& way, double ratio) {
  plan::PlanProblem problem =
      plan::PlanProblem::from_lengths(way.lengths, way.layout, way.capacity);
  if (way.zero > 1) problem.lockstep = plan::Lockstep::kHdp;
  plan::StepPlan plan = plan::make_plan(problem, "balanced");
  plan.memory = {.layers = static_cast<int>(model::ModelConfig::from_json(way.config).layers),
                 .resident_layers = way.resident_layers};
  for (plan::Slot& slot : plan.slots) {
    for (plan::Unit& unit : slot.units) unit.offload = ratio;
  }
  return plan;
}

Result run(const Way& way, double ratio) {
  const auto config = model::ModelConfig::from_json(way.config);
  const auto placement = place_model(config, way.layout, way.schedule, {}, parse_zero(way.zero));
  const plan::StepPlan plan = plan_of(way, ratio);
  const auto programs = plan::compile(plan, {.layers = static_cast<int>(config.layers),
                                             .schedule = way.schedule,
                                             .split = placement.split});
  plan::verify(plan, programs);
  const SampleLoader load = [&](std::int64_t id) {
    SampleTokens document;
    for (std::int64_t t = 0; t < way.lengths.at(static_cast<std::size_t>(id)); ++t) {
      document.tokens.push_back(
          static_cast<std::int32_t>((t * t + 5 * t + id) % config.vocab_size));
    }
    return document;
  };
  Result result;
  result.offload.resize(programs.size());
  std::mutex mutex;
  comm::run_thread_ranks(way.layout.world_size(), [&](comm::Communicator world) {
    ExecutorOptions options;
    options.recompute = way.recompute;
    options.spill_folder = way.folder;
    RankRun rank(world, placement, at::kFloat, options);
    const auto index = static_cast<std::size_t>(world.rank());
    StepOutcome outcome =
        rank.executor.run(plan, programs[index], load, rank.state, nullptr, [] {});
    const at::Tensor gradients = rank.state.whole_gradients();
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) result.gradients = gradients;
    result.loss_sum += outcome.loss_sum;
    result.offload[index] = outcome.offload;
  });
  return result;
}

/// Loss and gradients with parts of activations away are the same bits.
void expect_same_bits(const Way& way) {
  SCOPED_TRACE(way.config.substr(0, 40) + " " + way.layout.to_string() + " " + way.schedule +
               " zero " + std::to_string(way.zero) + " recompute " +
               std::to_string(static_cast<int>(way.recompute)));
  const Result kept = run(way, 0.0);
  for (const OffloadOutcome& rank : kept.offload) EXPECT_EQ(rank.out.bytes, 0);
  std::int64_t moved_before = 0;
  for (const double ratio : {0.25, 0.5, 1.0}) {
    const Result moved = run(way, ratio);
    EXPECT_TRUE(moved.gradients.equal(kept.gradients)) << "ratio " << ratio;
    EXPECT_EQ(moved.loss_sum, kept.loss_sum);
    std::int64_t bytes = 0;
    for (std::size_t r = 0; r < moved.offload.size(); ++r) {
      bytes += moved.offload[r].out.bytes;
      EXPECT_EQ(moved.offload[r].saved_bytes, kept.offload[r].saved_bytes);
      EXPECT_LE(moved.offload[r].back.bytes, moved.offload[r].out.bytes);
    }
    EXPECT_GT(bytes, moved_before) << "nothing moved: the test proves nothing";
    moved_before = bytes;
  }
}

constexpr Recompute kRecomputes[] = {Recompute::kNone, Recompute::kSelective, Recompute::kFull};

TEST(ActivationOffload, GradientsOfEveryFamilyAreTheSameBits) {
  for (const std::string& config : families()) {
    for (const Recompute recompute : kRecomputes) {
      expect_same_bits({.config = config, .recompute = recompute});
    }
  }
}

TEST(ActivationOffload, GradientsUnderEveryLayoutAndScheduleAreTheSameBits) {
  const std::vector<std::string> all = families();
  const std::string& dense = all[0];
  const std::string& moe = all[5];
  const std::string& latent = all[6];
  const std::vector<Way> ways{
      {.config = dense, .layout = {.hdp = 3}, .zero = 2},
      {.config = moe, .layout = {.tp = 2, .hdp = 2}},
      {.config = moe, .layout = {.hdp = 4, .ep = 2}, .zero = 3},
      {.config = dense, .layout = {.hdp = 2, .pp = 2}, .schedule = "1f1b"},
      {.config = moe, .layout = {.pp = 4}, .schedule = "1f1b", .resident_layers = 0},
      {.config = dense, .layout = {.hdp = 2, .pp = 2}, .schedule = "zb_h1", .resident_layers = 3},
      {.config = moe, .layout = {.pp = 2, .chunks = 2}, .schedule = "interleaved_1f1b"},
      {.config = latent, .layout = {.hdp = 2, .pp = 2, .chunks = 2}, .zero = 3, .schedule = "zb_v"},
      {.config = dense, .layout = {.tp = 2, .pp = 2}, .schedule = "zb_h1", .resident_layers = 2},
  };
  for (std::size_t i = 0; i < ways.size(); ++i) {
    Way way = ways[i];
    way.recompute = kRecomputes[i % std::size(kRecomputes)];
    expect_same_bits(way);
  }
}

/// Within what the model of memory says the peak falls by, as the goal has it.
constexpr double kModelError = 0.1;

void expect_predicted_peak(const Way& way) {
  SCOPED_TRACE(way.layout.to_string() + " " + way.schedule);
  const MemoryModel memory = plan_of(way, 0.0).memory;
  const Result kept = run(way, 0.0);
  for (const double ratio : {0.25, 0.5, 1.0}) {
    const Result moved = run(way, ratio);
    // Of the rank that holds most: what capacity is about.
    const auto peak = [](const Result& result) {
      return std::max_element(
                 result.offload.begin(), result.offload.end(),
                 [](const auto& a, const auto& b) { return a.peak_bytes < b.peak_bytes; })
          ->peak_bytes;
    };
    const auto before = static_cast<double>(peak(kept));
    const double fell = (before - static_cast<double>(peak(moved))) / before;
    const double predicted = 1.0 - memory.resident_fraction(ratio);
    EXPECT_NEAR(fell, predicted, kModelError * predicted) << "ratio " << ratio;
    ::testing::Test::RecordProperty("fell_at_" + std::to_string(static_cast<int>(100 * ratio)),
                                    std::to_string(fell) + " of " + std::to_string(predicted));
  }
}

TEST(ActivationOffload, PeakFallsByWhatTheMemoryModelSays) {
  for (const Recompute recompute : {Recompute::kNone, Recompute::kSelective}) {
    expect_predicted_peak({.config = config_of("llama", grouped(""), 12),
                           .recompute = recompute,
                           .resident_layers = 2,
                           .lengths = {900, 1100},
                           .capacity = 2000});
  }
}

TEST(ActivationOffload, PeakOfTheFullestStageFallsByWhatTheMemoryModelSays) {
  expect_predicted_peak({.config = config_of("llama", grouped(""), 24, 128),
                         .layout = {.pp = 2},
                         .schedule = "1f1b",
                         .resident_layers = 2,
                         .lengths = std::vector<std::int64_t>(12, 500),
                         .capacity = 2000});
}

/// A store on its own: three layers of one tensor each, of which the last stays.
class StoreOfThree : public ::testing::Test {
 protected:
  static constexpr std::int64_t kElements = std::int64_t{1} << 20;
  static constexpr std::int64_t kBytes = kElements * 4;

  static at::Tensor values(int layer) { return at::arange(kElements, at::kFloat).add_(layer); }

  static void fill(model::ActivationStore& store) {
    for (int layer = 0; layer < 3; ++layer) {
      store.push(Activation::kMlp, values(layer));
      store.layer_done(layer);
    }
  }

  static void expect_all_back(model::ActivationStore& store) {
    for (int layer = 2; layer >= 0; --layer) {
      EXPECT_TRUE(store.pop(Activation::kMlp).equal(values(layer))) << "layer " << layer;
    }
  }

  /// Of a tensor's memory, pages that are there.
  static std::int64_t resident_bytes(const void* data) {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data) / page * page;
    std::vector<unsigned char> there(kBytes / page + 1);
    EXPECT_EQ(::mincore(reinterpret_cast<void*>(begin), there.size() * page, there.data()), 0);
    return static_cast<std::int64_t>(page) *
           std::count_if(there.begin(), there.end(), [](unsigned char flags) { return flags & 1; });
  }

  TemporaryFolder folder_;
  static constexpr MemoryModel kMemory{.layers = 3, .resident_layers = 1, .transfer = 0.0};
};

TEST_F(StoreOfThree, WhatIsAwayIsNotInMemoryAndComesBackAsItWas) {
  for (const double ratio : {0.3, 1.0}) {
    ActivationOffload offload(folder_.path());
    offload.begin_step(kMemory, 3);
    const auto store = offload.make_store(ratio, {0, 3});
    const void* first = nullptr;
    {
      at::Tensor tensor = values(0);
      first = tensor.const_data_ptr();
      store->push(Activation::kMlp, std::move(tensor));
    }
    EXPECT_NEAR(static_cast<double>(resident_bytes(first)), kBytes, 1e4);
    store->layer_done(0);
    for (int layer = 1; layer < 3; ++layer) {
      store->push(Activation::kMlp, values(layer));
      store->layer_done(layer);
    }
    const auto away = static_cast<std::int64_t>(2 * ratio * kBytes);
    EXPECT_NEAR(static_cast<double>(store->bytes()), static_cast<double>(3 * kBytes - away), 2e4);
    EXPECT_NEAR(static_cast<double>(resident_bytes(first)), (1.0 - ratio) * kBytes, 1e4);
    EXPECT_TRUE(std::filesystem::is_empty(folder_.path())) << "a killed process would leave a file";
    expect_all_back(*store);
    EXPECT_EQ(store->bytes(), 0);
    const OffloadOutcome outcome = offload.outcome();
    EXPECT_EQ(outcome.saved_bytes, 3 * kBytes);
    EXPECT_NEAR(static_cast<double>(outcome.out.bytes), static_cast<double>(away), 2e4);
    EXPECT_EQ(outcome.back.bytes, outcome.out.bytes);
    EXPECT_GT(outcome.out.seconds, 0.0);
    EXPECT_GT(outcome.back.seconds, 0.0);
  }
}

TEST_F(StoreOfThree, SpaceInTheFileIsUsedAgain) {
  const model::FileLimit limit(2 * kBytes + (1 << 16));  // room for one micro-batch
  ActivationOffload offload(folder_.path());
  for (int step = 0; step < 3; ++step) {
    offload.begin_step(kMemory, 3);
    const auto store = offload.make_store(1.0, {0, 3});
    fill(*store);
    expect_all_back(*store);
  }
}

TEST_F(StoreOfThree, StoresThatAreDroppedLeaveRoomForOthers) {
  const model::FileLimit limit(2 * kBytes + (1 << 16));
  ActivationOffload offload(folder_.path());
  offload.begin_step(kMemory, 3);
  for (int i = 0; i < 3; ++i) fill(*offload.make_store(1.0, {0, 3}));
  const auto store = offload.make_store(1.0, {0, 3});
  fill(*store);
  expect_all_back(*store);
}

TEST_F(StoreOfThree, WhatSeveralEntriesShareIsHeldAndMovedOnce) {
  ActivationOffload offload(folder_.path());
  offload.begin_step(kMemory, 3);
  const auto store = offload.make_store(1.0, {0, 3});
  const at::Tensor original = values(7);
  {
    const at::Tensor shared = values(7);
    store->push(Activation::kLayerInput, shared);
    store->push(Activation::kMlp, at::Tensor());
    store->push(Activation::kQkv, shared);
  }
  store->layer_done(0);
  EXPECT_LE(store->bytes(), kBytes);
  store->layer_done(1);
  EXPECT_LT(store->bytes(), 20000);
  EXPECT_TRUE(store->pop(Activation::kQkv).equal(original));
  EXPECT_FALSE(store->pop(Activation::kMlp).defined());
  EXPECT_TRUE(store->pop(Activation::kLayerInput).equal(original));
  EXPECT_LE(offload.outcome().out.bytes, kBytes);
  EXPECT_EQ(offload.outcome().saved_bytes, kBytes);
}

TEST_F(StoreOfThree, WhatOthersStillUseStaysUntilTheyDoNot) {
  ActivationOffload offload(folder_.path());
  offload.begin_step(kMemory, 3);
  const auto store = offload.make_store(1.0, {0, 3});
  at::Tensor used = values(1);
  store->push(Activation::kMlp, used);
  store->layer_done(0);
  store->layer_done(1);  // waits for the copy of layer 0
  EXPECT_TRUE(used.equal(values(1)));
  EXPECT_EQ(store->bytes(), kBytes);
  used.reset();
  store->push(Activation::kMlp, values(2));
  store->layer_done(2);
  EXPECT_TRUE(store->pop(Activation::kMlp).equal(values(2)));
  EXPECT_TRUE(store->pop(Activation::kMlp).equal(values(1)));
}

void expect_words(const std::string& message, const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    EXPECT_NE(message.find(word), std::string::npos) << word << " in: " << message;
  }
}

TEST_F(StoreOfThree, AFullDiskIsOneErrorWithFolderAndBytes) {
  const model::FileLimit limit(kBytes / 2);
  ActivationOffload offload(folder_.path());
  offload.begin_step(kMemory, 3);
  const auto store = offload.make_store(1.0, {0, 3});
  expect_words(message_of<IoError>([&] { fill(*store); }),
               {"[parallel.offload] cannot write", folder_.path(), "free there: "});
}

TEST_F(StoreOfThree, AFolderThatIsNotThereIsAnError) {
  ActivationOffload offload(folder_.file("missing"));
  offload.begin_step(kMemory, 3);
  const auto store = offload.make_store(1.0, {0, 3});
  expect_words(message_of<IoError>([&] { fill(*store); }),
               {"cannot create", folder_.file("missing"), "No such file"});
}

TEST_F(StoreOfThree, AFailureInAStepNamesTheUnitAndTheFolder) {
  Way way{.config = families()[0], .layout = {.hdp = 2}};
  way.folder = folder_.file("missing");
  expect_words(message_of<IoError>([&] { (void)run(way, 0.5); }),
               {way.folder, "forward", "slot 0", "unit"});
}

TEST(ActivationOffloadPlan, AModelOfAnotherNumberOfLayersIsRefusedByName) {
  const Way way{.config = families()[0]};
  plan::StepPlan plan = plan_of(way, 0.5);
  plan.memory.layers = 6;
  try {
    check_offload(plan, 4);
    FAIL() << "not refused";
  } catch (const PlanError& error) {
    expect_words(error.what(), {"slot 0, unit 0 offloads 0.5", "6 layers", "the model has 4"});
  }
}

}  // namespace
}  // namespace meshloom::parallel::offload_test
