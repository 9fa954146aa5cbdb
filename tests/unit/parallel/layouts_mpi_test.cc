// The sweep of layouts_test.cc with processes as ranks, under mpirun.
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>

#include "layout_sweep.h"
#include "mpi_main.h"

namespace meshloom::parallel::sweep {
namespace {

std::optional<comm::Communicator> mpi_world;  // tests take no arguments

/// The step on the first `ranks` processes, the others idle.
void expect_equal(const Setting& setting, const char* strategy, int ranks, int ep = 1) {
  SCOPED_TRACE(std::string(strategy) + ", " + std::to_string(ranks) + " ranks, ep " +
               std::to_string(ep));
  auto hdp = mpi_world->split(mpi_world->rank() < ranks ? 0 : -1, mpi_world->rank(), "hdp");
  if (!hdp) return;
  const auto texts = documents(ranks, model::ModelConfig::from_json(setting.config).vocab_size);
  const auto plan = plan::make_plan(problem_of(texts, ranks, ep), strategy);
  EXPECT_EQ(run_and_compare(setting, plan, texts, solve_alone(setting, texts), *hdp), "")
      << "rank " << hdp->rank() << " of " << hdp->size();
}

TEST(LayoutsMpi, EveryStrategyEqualsOneRank) {
  for (const char* strategy : {"static", "naive_hdp", "balanced", "bytescale"}) {
    for (const char* config : {kMoe, kDense}) {
      expect_equal({.config = config}, strategy, mpi_world->size());
    }
  }
}

TEST(LayoutsMpi, EveryRankCountEqualsOneRank) {
  for (int ranks = 1; ranks < mpi_world->size(); ++ranks) {
    expect_equal({.config = kMixtral}, "balanced", ranks);
  }
}

TEST(LayoutsMpi, ExpertParallelismEqualsOneRank) {
  for (int ep = 2; ep <= mpi_world->size(); ep *= 2) {
    for (const char* config : {kMoe, kMixtral}) {
      expect_equal({.config = config, .balance = "sequence"}, "balanced", mpi_world->size(), ep);
    }
  }
}

TEST(LayoutsMpi, BalanceAndZLossesEqualOneRank) {
  for (const char* form : {"sequence", "global", "global_lagged"}) {
    expect_equal({.config = kMoe, .balance = form, .z_loss = 0.02}, "balanced", mpi_world->size());
  }
}

}  // namespace
}  // namespace meshloom::parallel::sweep

int main(int argc, char** argv) {
  return meshloom::parallel::run_mpi_tests(argc, argv, meshloom::parallel::sweep::mpi_world);
}
