#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "meshloom/core/random.h"
#include "meshloom/plan/strategy.h"

namespace meshloom::plan::testing {

/// A problem that is a function of its seed: any rank count up to `most_ranks`, any capacity, any
/// lengths up to what the axis holds (one in eight steps has a sample that just fits it), with and
/// without nodes, offload, fixed costs and exchange costs.
inline PlanProblem any_problem(std::uint64_t seed, int most_ranks, int most_samples) {
  std::uint64_t next = 0;
  const std::uint64_t key = random_key("fuzz", seed);
  const auto below = [&](std::uint64_t n) { return random_bits(key, next++) % n; };
  PlanProblem problem;
  // Small problems more often: they are planned faster and hold as many surprises.
  const auto up_to = [&](int most, int few) {
    return 1 + below(static_cast<std::uint64_t>(below(4) == 0 ? most : std::min(most, few)));
  };
  problem.layout.hdp = static_cast<int>(up_to(most_ranks, 24));
  problem.capacity_tokens = 1 + static_cast<std::int64_t>(below(1ull << (1 + below(15))));
  problem.cost.linear = below(2) ? 24576.0 : 0.0;
  problem.ranks_per_node = static_cast<int>(below(3) ? 0 : 1 + below(16));
  if (below(4) == 0) problem.memory = {32, 2};
  const std::uint64_t samples = up_to(most_samples, 12);
  const std::int64_t most =
      problem.memory.unit_capacity(problem.capacity_tokens, problem.layout.hdp, 1.0);
  double work = 0.0;
  for (std::uint64_t i = 0; i < samples; ++i) {
    const double power = random_uniform(key, next++) * (below(2) ? 1.0 : 0.6);
    auto tokens = std::clamp<std::int64_t>(
        static_cast<std::int64_t>(std::pow(static_cast<double>(most), power)), 1, most);
    if (i == samples / 2 && seed % 8 == 0) tokens = most;
    problem.samples.push_back({static_cast<std::int64_t>(i) * 3, tokens, tokens - 1});
    work += problem.cost.work(tokens);
  }
  if (below(3) == 0) problem.cost.fixed = 0.02 * work / problem.layout.hdp;
  if (below(3) == 0) problem.cost.exchange = 0.1 * static_cast<double>(problem.capacity_tokens);
  return problem;
}

/// The same on a mesh with pipeline stages, model chunks, expert parallelism or lockstep.
inline PlanProblem any_mesh_problem(std::uint64_t seed, int most_ranks, int most_samples) {
  PlanProblem problem = any_problem(seed, most_ranks, most_samples);
  problem.layout.pp = 1 + static_cast<int>(seed % 4);
  problem.layout.chunks = 1 + static_cast<int>(seed % 2);
  const int ep = 1 << (seed / 4 % 4);
  if (problem.layout.hdp % ep == 0) problem.layout.ep = ep;
  if (seed % 3 == 0) problem.lockstep = Lockstep::kHdp;
  return problem;
}

}  // namespace meshloom::plan::testing
