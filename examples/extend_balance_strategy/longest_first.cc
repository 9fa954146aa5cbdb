// A balance strategy of one's own, handed to the trainer.
//
//   mpirun -n 4 build/cmake/examples/extend_balance_strategy examples/01_train_text/config.yaml
#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/environment.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/train/open_data.h"
#include "meshloom/train/trainer.h"

namespace {

namespace plan = meshloom::plan;

/// Longest sample first, one a unit, each on the fewest ranks that hold it and on those that are
/// free first.
class LongestFirst final : public plan::BalanceStrategy {
 public:
  [[nodiscard]] std::vector<plan::Slot> assign(const plan::PlanProblem& problem) const override {
    std::vector<plan::SampleInfo> samples = problem.samples;
    std::stable_sort(samples.begin(), samples.end(),
                     [](const auto& a, const auto& b) { return a.tokens > b.tokens; });
    const auto hdp = static_cast<std::size_t>(problem.layout.hdp);
    std::vector<double> busy_until(hdp, 0.0);
    std::vector<plan::Unit> units;
    for (const plan::SampleInfo& sample : samples) {
      const auto degree =
          static_cast<int>((sample.tokens + problem.capacity_tokens - 1) / problem.capacity_tokens);
      std::vector<int> ranks(hdp);
      std::iota(ranks.begin(), ranks.end(), 0);
      std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) {
        return busy_until[static_cast<std::size_t>(a)] < busy_until[static_cast<std::size_t>(b)];
      });
      ranks.resize(static_cast<std::size_t>(degree));
      double end = busy_until[static_cast<std::size_t>(ranks.back())];
      end += problem.cost.unit_time(problem.cost.work(sample.tokens), sample.tokens, degree);
      for (const int rank : ranks) busy_until[static_cast<std::size_t>(rank)] = end;
      std::sort(ranks.begin(), ranks.end());
      plan::Unit unit{.ranks = std::move(ranks), .samples = {sample.id}};
      unit.exchange = degree > 1 ? plan::Exchange::kRing : plan::Exchange::kLocal;
      units.push_back(std::move(unit));
    }
    return plan::into_slots(std::move(units), problem.layout.hdp);
  }
};

void train(const char* path) {
  auto config = meshloom::train::TrainConfig::load(path);
  config.strategy = "longest_first";
  config.run += "_longest_first";
  auto world = meshloom::comm::make_world(meshloom::Environment::from_process());
  const auto model = meshloom::train::load_model_config(config);
  const auto data = meshloom::train::open_data(config, model.vocab_size, world);
  meshloom::train::Trainer trainer(config, model, data, world, std::make_shared<LongestFirst>());
  trainer.run([&](const meshloom::train::StepMetrics& step) {
    if (world.rank() != 0) return;
    std::printf("step %lld: loss %.4f, balance %.3f by %s\n", static_cast<long long>(step.step),
                step.loss, step.balance_efficiency, trainer.last_plan().strategy.c_str());
    std::fflush(stdout);
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s CONFIG.yaml\n", argv[0]);
    return 2;
  }
  try {
    train(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
