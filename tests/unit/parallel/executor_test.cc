#include "meshloom/parallel/executor.h"

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "layout_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "rank_run.h"

namespace meshloom::parallel {
namespace {

using sweep::kDense;
using sweep::kMoe;

/// A step of documents of these lengths, ids from `first_id`.
struct Step {
  Step(const std::vector<std::int64_t>& lengths, int ranks, std::int64_t capacity,
       std::int64_t first_id = 0)
      : config(model::ModelConfig::from_json(kDense)) {
    problem.step = 12;
    problem.layout.hdp = ranks;
    problem.capacity_tokens = capacity;
    for (const auto length : lengths) {
      problem.samples.push_back({.id = first_id + std::ssize(problem.samples),
                                 .tokens = length,
                                 .loss_tokens = length - 1});
    }
    plan = plan::make_plan(problem, "balanced");
    programs = plan::compile(plan, {.layers = static_cast<int>(config.layers)});
    load = [this](std::int64_t id) {
      SampleTokens document;
      for (const auto& sample : problem.samples) {
        if (sample.id != id) continue;
        for (std::int64_t t = 0; t < sample.tokens; ++t) {
          document.tokens.push_back(static_cast<std::int32_t>((t * t + id) % config.vocab_size));
        }
      }
      return document;
    };
  }

  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  /// Runs the step on a rank.
  void run(const comm::Communicator& hdp, ExecutorOptions options = {},
           const SampleLoader& loader = {}) const {
    RankRun rank(hdp, place_model(config, problem.layout), at::kFloat, std::move(options));
    (void)rank.executor.run(plan, programs.at(static_cast<std::size_t>(hdp.rank())),
                            loader ? loader : load, rank.state, nullptr, [] {});
  }

  model::ModelConfig config;
  plan::PlanProblem problem;
  plan::StepPlan plan;
  std::vector<plan::Program> programs;
  SampleLoader load;
};

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

TEST(Executor, PlansOfAnotherWorldAreRefused) {
  const auto world = comm::make_thread_world(2);
  const Step one({5, 9}, 1, 32);
  EXPECT_NE(error_of([&] { one.run(world[0]); }).find("ranks of the world"), std::string::npos);
  Step deeper({5, 9}, 1, 32);
  deeper.plan.memory.layers = 7;
  deeper.plan.slots[0].units[0].offload = 0.5;
  const auto alone = comm::make_thread_world(1);
  EXPECT_NE(error_of([&] { deeper.run(alone[0]); }).find("slot 0, unit 0 offloads 0.5"),
            std::string::npos);
  EXPECT_EQ(alone[0].traffic().size(), 0U) << "nothing has run";
  Step swapped({60, 9}, 2, 64);
  std::swap(swapped.programs[0], swapped.programs[1]);
  EXPECT_NE(error_of([&] { swapped.run(world[0]); }).find("rank of the program"),
            std::string::npos);
}

TEST(Executor, EveryCallCarriesInstructionSlotUnitAndSamplesInTheFlightRecorder) {
  const Step step({60, 60}, 2, 32, 40);
  comm::run_thread_ranks(2, [&](comm::Communicator hdp) {
    step.run(hdp);
    std::set<std::string> seen;
    for (const auto& record : hdp.recorder().records()) {
      seen.insert(record.purpose + ": " + record.context);
      if (record.purpose != "exchange") continue;
      EXPECT_EQ(record.label.step, 12);
      EXPECT_EQ(record.label.unit, 0);
      ASSERT_EQ(record.label.samples.size(), 1U);
      EXPECT_EQ(record.label.samples[0] / 10, 4);  // samples 40 and 41
    }
    // 60 tokens on ranks that hold 32: each document is a unit of both, in its own slot.
    for (const char* expected : {
             "exchange: step 12 forward slot 0 unit 0 samples 4",
             "exchange: step 12 backward slot 0 unit 0 samples 4",
             "exchange: step 12 forward slot 1 unit 0 samples 4",
             "gradients: step 12 backward slot 1 unit 0",
             "parameters: step 12 step",
         }) {
      const auto found = seen.lower_bound(expected);
      EXPECT_TRUE(found != seen.end() && found->starts_with(expected)) << expected;
    }
    EXPECT_EQ(seen.count("exchange: "), 0U) << "a call without its context";
    hdp.barrier().wait();
    EXPECT_EQ(hdp.recorder().records().back().context, "") << "the step's context stays behind";
  });
}

TEST(Executor, TokensOutsideTheVocabularyAreRefusedByName) {
  const auto world = comm::make_thread_world(1);
  const Step step({5, 9}, 1, 32, 70);
  for (const std::int32_t bad : {-1, 53}) {
    const auto message = error_of([&] {
      step.run(world[0], {}, [&](std::int64_t id) {
        auto document = step.load(id);
        if (id == 71) document.tokens[4] = bad;
        return document;
      });
    });
    EXPECT_NE(message.find("sample 71: token " + std::to_string(bad) +
                           " at position 4 is outside the vocabulary of 53"),
              std::string::npos)
        << message;
  }
}

TEST(Executor, FailureNamesStepSlotUnitAndSamplesOnEveryRank) {
  const Step step({60}, 2, 32, 5);
  std::vector<std::string> messages(2);
  comm::run_thread_ranks(2, [&](comm::Communicator hdp) {
    ExecutorOptions options;
    options.before = [&](const plan::Instruction& instruction) {
      if (hdp.rank() == 1 && instruction.op == plan::Op::kBackward) {
        throw DataError("test", "planted failure");
      }
    };
    messages[static_cast<std::size_t>(hdp.rank())] =
        error_of([&] { step.run(hdp, std::move(options)); });
  });
  for (const char* part :
       {"step 12", "backward", "slot 0", "unit 0", "samples 5", "rank 1/2", "planted failure"}) {
    EXPECT_NE(messages[1].find(part), std::string::npos) << part << " in: " << messages[1];
    EXPECT_NE(messages[0].find(part), std::string::npos) << part << " in: " << messages[0];
  }
}

}  // namespace
}  // namespace meshloom::parallel
