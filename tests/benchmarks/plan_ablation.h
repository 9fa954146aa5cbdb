#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

#include "benchmarks/plan_lengths.h"
#include "meshloom/plan/bounds.h"
#include "meshloom/plan/program.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/sim/simulator.h"

/// ByteScale's ablation (LLaMA-7B, 2M context, 1,024 GPUs, production mix), simulated.
namespace meshloom::benchmarks {

/// Algorithm 1 with equation 3: the offload ratio that gives the fewest ranks.
/// @param most_time  of one sample: it gets as many ranks as end it by then; 0: as equation 3 says
inline std::vector<plan::Slot> naive_with_offload(const plan::PlanProblem& problem,
                                                  double most_time) {
  const int hdp = problem.layout.hdp;
  std::vector<plan::Unit> units;
  const auto add = [&](std::vector<std::int64_t> samples, int degree, double offload) {
    plan::Unit unit;
    unit.ranks.resize(static_cast<std::size_t>(degree));  // chosen below
    unit.samples = std::move(samples);
    unit.exchange = degree > 1 ? plan::Exchange::kRing : plan::Exchange::kLocal;
    unit.offload = offload;
    units.push_back(std::move(unit));
  };
  for (const auto& sample : problem.samples) {
    if (sample.tokens < problem.capacity_tokens) continue;
    const double hidden = problem.memory.most_hidden(problem.cost, sample.tokens);
    int degree = problem.memory.degree_needed(problem.capacity_tokens, hidden, sample.tokens, hdp)
                     .value_or(hdp);
    const double work = problem.cost.work(sample.tokens);
    while (most_time > 0.0 && degree < hdp &&
           problem.cost.unit_time(work, sample.tokens, degree) > most_time) {
      ++degree;
    }
    add({sample.id}, degree,
        problem.memory.offload_needed(problem.capacity_tokens, degree, sample.tokens)
            .value_or(1.0));
  }
  std::vector<std::int64_t> bin;
  std::int64_t held = 0;
  for (const auto& sample : problem.samples) {
    if (sample.tokens >= problem.capacity_tokens) continue;
    if (held + sample.tokens > problem.capacity_tokens) {
      add(std::exchange(bin, {}), 1, 0.0);
      held = 0;
    }
    bin.push_back(sample.id);
    held += sample.tokens;
  }
  if (!bin.empty()) add(std::move(bin), 1, 0.0);
  // To the ranks with the fewest micro-batches, as `naive_hdp` does.
  std::vector<std::pair<int, int>> next;  // slot, rank
  for (int rank = 0; rank < hdp; ++rank) next.emplace_back(0, rank);
  for (plan::Unit& unit : units) {
    const auto degree = static_cast<std::ptrdiff_t>(unit.ranks.size());
    std::partial_sort(next.begin(), next.begin() + degree, next.end());
    const int slot = next[unit.ranks.size() - 1].first;
    for (std::size_t i = 0; i < unit.ranks.size(); ++i) {
      unit.ranks[i] = next[i].second;
      next[i].first = slot + 1;
    }
    std::sort(unit.ranks.begin(), unit.ranks.end());
  }
  return plan::into_slots(std::move(units), hdp);
}

/// One reading of the published setting.
struct Setting {
  const char* name;
  double compute_rate;  ///< of one GPU, against figure 6
  double bandwidth;     ///< between nodes, bytes/s a GPU
};

inline void ablation_of(const Setting& setting) {
  sim::Cluster cluster;  // 8 GPUs a node, 200 GB/s inside, 25 GB/s to the host
  cluster.compute_rate = setting.compute_rate;
  cluster.between = {.bandwidth = setting.bandwidth, .latency = 15e-6};
  const auto workload = sim::Workload::llama_7b();
  const auto lengths = production_mix(64LL << 20, 1);
  auto problem = plan::PlanProblem::from_lengths(lengths, {.hdp = 1024}, 8192);
  problem.cost = sim::Workload::llama_7b_cost();
  problem.ranks_per_node = cluster.ranks_per_node;
  double tokens = 0.0;
  double longest = 0.0;
  double work = 0.0;
  for (const auto length : lengths) {
    tokens += static_cast<double>(length);
    if (length >= 131072) longest += static_cast<double>(length);
    work += problem.cost.work(length);
  }
  std::printf(
      "\n### ByteScale's ablation, simulated, %s: 7B, 2M context, 1,024 GPUs, %.1f M tokens in %zu "
      "documents (%.1f %% of tokens in documents from 128K on)\n\n| step | step time | factor "
      "| published | without computation | exposed | sent between nodes |\n"
      "|---|---|---|---|---|---|---|\n",
      setting.name, tokens / 1e6, lengths.size(), 100 * longest / tokens);
  double first = 0.0;
  const auto row = [&](const char* name, const char* published, const plan::StepPlan& plan) {
    const auto programs = plan::compile(plan, {.layers = workload.layers});
    const auto result = sim::simulate(plan, programs, cluster, workload, {.spans = false});
    if (first == 0.0) first = result.step_time;
    double exposed = 0.0;
    for (const double part : result.exposed) exposed += part;
    std::printf("| %s | %.1f s | %.2f | %s | %.1f %% | %.1f %% | %.1f TB |\n", name,
                result.step_time, first / result.step_time, published, 100 * result.bubble(),
                100 * exposed / (1024 * result.step_time), result.bytes_between / 1e12);
    std::fflush(stdout);
  };
  row("static degree", "1.00", plan::make_plan(problem, "static"));
  row("dynamic communication (`naive_hdp`)", "1.59", plan::make_plan(problem, "naive_hdp"));
  problem.memory = {.layers = 32,
                    .resident_layers = 2,
                    .transfer = setting.compute_rate * workload.saved_bytes * workload.layers /
                                cluster.host.bandwidth};
  const auto with_offload = [&](double most_time) {
    const auto strategy = plan::make_strategy([most_time](const plan::PlanProblem& asked) {
      return naive_with_offload(asked, most_time);
    });
    return plan::make_plan(problem, "naive_hdp + offload", *strategy);
  };
  row("selective offload, ranks as equation 3 has them", "2.01", with_offload(0.0));
  row("selective offload, no sample longer than the mean load", "2.01",
      with_offload(work / problem.layout.hdp));
  row("balance (`bytescale`)", "3.69", plan::make_plan(problem, "bytescale"));
  row("balance (`balanced`)", "-", plan::make_plan(problem, "balanced"));
}

inline void ablation() {
  // Figure 18: a transfer of 8K tokens' keys and values (33.5 MB) takes 1.4 to 1.9 ms.
  constexpr double kLink = 33.5e6 / 1.65e-3;
  ablation_of(
      {.name = "figure 6 and the link of figure 18", .compute_rate = 1.0, .bandwidth = kLink});
  // There a ring step of 8K tokens computes for 2.8 ms; by figure 6 it would for 0.59 ms.
  ablation_of({.name = "figure 18 alone", .compute_rate = 0.59 / 2.8, .bandwidth = kLink});
}

}  // namespace meshloom::benchmarks
