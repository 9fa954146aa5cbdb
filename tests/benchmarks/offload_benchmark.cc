// What offloading activations costs in time and saves in memory, on one rank on CPU.
//
//   offload_benchmark pairs FOLDER [RATIO] [TOKENS] [PAIRS] [THREADS]   steps without and with
//   offload_benchmark peak FOLDER [RATIO] [TOKENS]   one process's peak of resident memory
//
// FOLDER holds the file for what is away. Computation takes one thread by default, so that the
// copying thread has a core of its own where there are two.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/model/config.h"
#include "meshloom/model/parameters.h"
#include "meshloom/parallel/executor.h"
#include "meshloom/parallel/groups.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/model_state.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/strategy.h"

namespace {

using namespace meshloom;

constexpr int kLayers = 12;

const char* const kModel = R"({
  "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
  "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8})";

/// One rank with the model and a step of one document.
class Rank {
 public:
  Rank(const std::string& folder, std::int64_t tokens)
      : config_(model::ModelConfig::from_json(kModel)),
        world_(comm::make_thread_world(1)[0]),
        placement_(parallel::place_model(config_, {})),
        groups_(world_, placement_),
        state_(placement_, groups_, at::kFloat, at::kCPU),
        executor_(parallel::build_stages(placement_, groups_.at()), placement_, groups_,
                  {.spill_folder = folder}),
        plan_(plan::make_plan(plan::PlanProblem::from_lengths({tokens}, {}, tokens))),
        program_(plan::compile_rank(plan_, {.layers = kLayers}, 0)) {
    plan_.memory = {.layers = kLayers, .resident_layers = 2};
    state_.assign([&](const model::ParameterTable& table, at::Tensor& values) {
      model::initialize_(values, table, config_.initializer_range, 1);
    });
  }

  struct Step {
    double seconds = 0.0;
    double forward_seconds = 0.0;
    parallel::OffloadOutcome offload;
  };

  Step run(double ratio) {
    plan_.slots.at(0).units.at(0).offload = ratio;
    const auto load = [&](std::int64_t sample) {
      parallel::SampleTokens document;
      const std::int64_t tokens = plan_.samples.at(static_cast<std::size_t>(sample)).tokens;
      for (std::int64_t t = 0; t < tokens; ++t) {
        document.tokens.push_back(static_cast<std::int32_t>((t * t + 5 * t) % config_.vocab_size));
      }
      return document;
    };
    const auto begin = std::chrono::steady_clock::now();
    const auto outcome = executor_.run(plan_, program_, load, state_, nullptr, [] {});
    const auto end = std::chrono::steady_clock::now();
    Step step{.seconds = std::chrono::duration<double>(end - begin).count(),
              .offload = outcome.offload};
    for (const parallel::Span& span : outcome.spans) {
      if (span.kind != parallel::Span::Kind::kForward) continue;
      step.forward_seconds += std::chrono::duration<double>(span.end - span.begin).count();
    }
    return step;
  }

  [[nodiscard]] const MemoryModel& memory() const { return plan_.memory; }

 private:
  model::ModelConfig config_;
  comm::Communicator world_;
  parallel::ModelPlacement placement_;
  parallel::Groups groups_;
  parallel::ModelState state_;
  parallel::Executor executor_;
  plan::StepPlan plan_;
  plan::Program program_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

double gigabytes(std::int64_t bytes) { return static_cast<double>(bytes) / 1e9; }

void pairs(Rank& rank, double ratio, int count) {
  (void)rank.run(0.0);
  (void)rank.run(ratio);
  std::vector<double> costs;
  std::vector<double> hidden;
  for (int pair = 0; pair < count; ++pair) {
    Rank::Step kept;
    Rank::Step moved;
    if (pair % 2 == 0) kept = rank.run(0.0);
    moved = rank.run(ratio);
    if (pair % 2 == 1) kept = rank.run(0.0);
    const parallel::OffloadOutcome& o = moved.offload;
    const double per_byte = std::max(o.out.seconds / static_cast<double>(o.out.bytes),
                                     o.back.seconds / static_cast<double>(o.back.bytes));
    costs.push_back(moved.seconds / kept.seconds - 1.0);
    // r_max: the part of all activations whose copy a forward lasts as long as.
    hidden.push_back(kept.forward_seconds / (per_byte * static_cast<double>(o.saved_bytes)));
    const double fell = 1.0 - gigabytes(o.peak_bytes) / gigabytes(kept.offload.peak_bytes);
    fmt::print(
        "pair {}: {:.3f} s and {:.3f} s ({:+.2f} %), waited {:.4f} s; out {:.2f} GB in {:.3f} s, "
        "back {:.2f} GB in {:.3f} s; held {:.3f} and {:.3f} GB (-{:.1f} %, predicted -{:.1f} %)\n",
        pair, kept.seconds, moved.seconds, 100.0 * costs.back(), o.exposed_seconds,
        gigabytes(o.out.bytes), o.out.seconds, gigabytes(o.back.bytes), o.back.seconds,
        gigabytes(kept.offload.peak_bytes), gigabytes(o.peak_bytes), 100.0 * fell,
        100.0 * (1.0 - rank.memory().resident_fraction(ratio)));
    std::fflush(stdout);
  }
  fmt::print("ratio {}: cost {:+.2f} % (median of {} pairs); forward hides ratios up to {:.2f}\n",
             ratio, 100.0 * median(costs), count, std::min(1.0, median(hidden)));
}

std::int64_t peak_resident() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return std::int64_t{usage.ru_maxrss} * 1024;
}

void peak(Rank& rank, double ratio) {
  const std::int64_t before = peak_resident();
  const Rank::Step step = rank.run(ratio);
  fmt::print(
      "ratio {}: resident {:.3f} GB before the step, {:.3f} GB at its peak; stores held "
      "{:.3f} GB of {:.3f} GB saved by layers\n",
      ratio, gigabytes(before), gigabytes(peak_resident()), gigabytes(step.offload.peak_bytes),
      gigabytes(step.offload.saved_bytes));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc < 3 || (what != "pairs" && what != "peak")) {
    fmt::print(stderr, "usage: {} pairs|peak FOLDER [RATIO] [TOKENS] [PAIRS] [THREADS]\n", argv[0]);
    return 2;
  }
  try {
    at::set_num_threads(argc > 6 ? std::stoi(argv[6]) : 1);
    const double ratio = argc > 3 ? std::stod(argv[3]) : 0.5;
    Rank rank(argv[2], argc > 4 ? std::stoll(argv[4]) : 4096);
    if (what == "pairs") {
      pairs(rank, ratio, argc > 5 ? std::stoi(argv[5]) : 10);
    } else {
      peak(rank, ratio);
    }
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
  return 0;
}
