#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "layout_sweep.h"
#include "meshloom/comm/backends.h"

namespace meshloom::parallel::sweep {
namespace {

const std::vector<int> kRankCounts{1, 2, 3, 4, 5, 7, 8};

void expect_equal(const Setting& setting, const plan::StepPlan& plan,
                  const std::vector<model::Document>& documents, const Expected& expected) {
  std::mutex mutex;
  comm::run_thread_ranks(plan.layout.world_size(), [&](comm::Communicator world) {
    const auto wrong = run_and_compare(setting, plan, documents, expected, world);
    const std::lock_guard lock(mutex);
    EXPECT_EQ(wrong, "") << "rank " << world.rank() << " of " << world.size();
  });
}

std::int64_t vocabulary_of(const Setting& setting) {
  return model::ModelConfig::from_json(setting.config).vocab_size;
}

void sweep_strategies(const Setting& setting) {
  for (const int ranks : kRankCounts) {
    const auto texts = documents(ranks, vocabulary_of(setting));
    const auto expected = solve_alone(setting, texts);
    for (const char* strategy : {"static", "naive_hdp", "balanced", "bytescale"}) {
      SCOPED_TRACE(std::to_string(ranks) + " ranks, " + strategy);
      const auto plan = plan::make_plan(problem_of(texts, ranks), strategy);
      expect_equal(setting, plan, texts, expected);
    }
  }
}

TEST(Layouts, MixtureOfExpertsEqualsOneRankUnderEveryStrategy) {
  sweep_strategies({.config = kMoe});
}

TEST(Layouts, DenseModelEqualsOneRankUnderEveryStrategy) { sweep_strategies({.config = kDense}); }

/// One unit of all ranks with all documents: members without a row of some, or without any.
plan::StepPlan one_unit(const std::vector<model::Document>& texts, int ranks, int rotate) {
  const auto strategy = plan::make_strategy([&](const plan::PlanProblem& problem) {
    plan::Unit unit;
    for (int r = 0; r < ranks; ++r) unit.ranks.push_back((r * (ranks - 1) + rotate) % ranks);
    for (const auto& sample : problem.samples) unit.samples.push_back(sample.id);
    unit.exchange = ranks == 1 ? plan::Exchange::kLocal : plan::Exchange::kRing;
    return std::vector<plan::Slot>{{.units = {unit}}};
  });
  auto problem = problem_of(texts, ranks);
  problem.capacity_tokens = 1 << 12;
  return plan::make_plan(problem, "one_unit", *strategy);
}

TEST(Layouts, DocumentsShorterThanTheirUnitEqualOneRank) {
  for (const char* config : {kMoe, kMixtral, kDense}) {
    const Setting setting{.config = config};
    for (const int ranks : kRankCounts) {
      SCOPED_TRACE(ranks);
      auto texts = documents(ranks, vocabulary_of(setting));
      expect_equal(setting, one_unit(texts, ranks, 1), texts, solve_alone(setting, texts));
    }
    // Seven tokens in four documents on eight ranks: most members hold nothing.
    auto texts = documents(1, vocabulary_of(setting));
    std::erase_if(texts, [](const auto& document) { return document.tokens.size() > 3; });
    ASSERT_EQ(texts.size(), 4U);
    const auto plan = one_unit(texts, 8, 0);
    // Too few tokens for every expert to have one; its gradient is zero then.
    const auto expected = solve_alone(setting, texts);
    comm::run_thread_ranks(8, [&](comm::Communicator hdp) {
      const auto wrong = run_and_compare(setting, plan, texts, expected, hdp);
      EXPECT_EQ(wrong.find("off by"), std::string::npos) << wrong;
      EXPECT_EQ(wrong.find("loss "), std::string::npos) << wrong;
    });
  }
}

TEST(Layouts, BalanceAndZLossesEqualOneRank) {
  for (const char* config : {kMoe, kMixtral}) {
    for (const char* form : {"sequence", "global", "global_lagged"}) {
      const Setting setting{.config = config, .balance = form, .z_loss = 0.02};
      for (const int ranks : {1, 3, 4, 8}) {
        SCOPED_TRACE(std::string(form) + ", " + std::to_string(ranks) + " ranks");
        const auto texts = documents(ranks, vocabulary_of(setting));
        const auto expected = solve_alone(setting, texts);
        for (const char* strategy : {"static", "balanced"}) {
          SCOPED_TRACE(strategy);
          const auto plan = plan::make_plan(problem_of(texts, ranks), strategy);
          expect_equal(setting, plan, texts, expected);
        }
      }
    }
  }
}

TEST(Layouts, ExpertParallelismEqualsOneRank) {
  for (const char* config : {kMoe, kMixtral}) {
    for (const char* form : {"none", "sequence", "global", "global_lagged"}) {
      const Setting setting{.config = config, .balance = form, .z_loss = 0.02};
      const auto texts = documents(4, vocabulary_of(setting));
      const auto expected = solve_alone(setting, texts);
      for (const int ep : {2, 4}) {
        SCOPED_TRACE(std::string(form) + ", ep " + std::to_string(ep));
        const auto plan = plan::make_plan(problem_of(texts, 4, ep), "balanced");
        expect_equal(setting, plan, texts, expected);
      }
    }
  }
}

TEST(Layouts, SinglePrecisionEqualsOneRank) {
  for (const char* config : {kDense, kMoe}) {
    const Setting setting{.config = config, .dtype = at::kFloat};
    for (const int ranks : {2, 5, 8}) {
      SCOPED_TRACE(ranks);
      const auto texts = documents(ranks, vocabulary_of(setting));
      const auto plan = plan::make_plan(problem_of(texts, ranks), "balanced");
      expect_equal(setting, plan, texts, solve_alone(setting, texts));
    }
  }
}

TEST(Layouts, BothHalvesOfTheSweepAreReal) {
  // Every strategy makes units of one rank and of all, and one makes some between; or the sweep is
  // hollow.
  bool some = false;
  for (const char* strategy : {"naive_hdp", "balanced", "bytescale"}) {
    SCOPED_TRACE(strategy);
    bool one = false;
    for (const int ranks : {2, 3, 4, 5, 7, 8}) {
      const auto plan = plan::make_plan(problem_of(documents(ranks, 61), ranks), strategy);
      bool all = false;
      for (const auto& slot : plan.slots) {
        for (const auto& unit : slot.units) {
          const auto size = static_cast<int>(unit.ranks.size());
          one = one || size == 1;
          all = all || size == ranks;
          some = some || (size > 1 && size < ranks);
        }
      }
      EXPECT_TRUE(all) << ranks;
    }
    EXPECT_TRUE(one);
  }
  EXPECT_TRUE(some);
}

}  // namespace
}  // namespace meshloom::parallel::sweep
