#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/exchange.h"
#include "meshloom/parallel/sample_batch.h"
#include "meshloom/plan/exchange_traffic.h"
#include "meshloom/plan/step_plan.h"

/// Attention over a unit against attention of one process, for any ranks: threads or processes.
namespace meshloom::parallel::exchange_sweep {

/// Standard normal numbers, drawn in double.
at::Tensor random_tensor(const std::vector<std::int64_t>& shape, std::uint64_t seed,
                         at::ScalarType type = at::kDouble);

/// Tokens are their row in the concatenated documents, so that slices can be gathered.
SampleLoader row_numbers(const std::vector<std::int64_t>& lengths);

struct Case {
  plan::Exchange exchange = plan::Exchange::kRing;
  int group = 0;  ///< ulysses_degree, with ring_ulysses only
  std::vector<int> ranks;
  std::int64_t heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t window = 0;
  std::vector<std::int64_t> lengths;
  at::ScalarType type = at::kDouble;
  std::optional<at::ScalarType> wire_type;

  [[nodiscard]] std::string text() const;
  [[nodiscard]] plan::StepPlan plan() const;
  [[nodiscard]] plan::ExchangeShape shape() const;
};

/// Inputs of all tokens, and what one process makes of them.
struct Whole {
  explicit Whole(const Case& c);
  at::Tensor q, k, v, dout;
  model::AttentionOutput output;
  model::AttentionGradients gradients;
};

/// What one rank found; errors are relative to the largest element of the whole tensor.
struct Found {
  double error = 0.0;  ///< of output and gradients, the worst
  plan::ExchangeBytes sent;
};

/// Runs this rank's share; a rank outside the unit does nothing.
Found run(const comm::Communicator& hdp, const Case& c, const Whole& whole);

/// Every exchange that a unit of so many ranks can have, as (exchange, group).
std::vector<std::pair<plan::Exchange, int>> exchanges_of(int degree);

/// Calls `check` with cases of random documents, windows and rank sets on an axis of `world` ranks:
/// for every number of ranks up to it, every exchange, 3, 7 and 8 heads and 1, 2 and 8 K/V heads
/// where they divide. `part` of them, chosen by number, the same on all ranks.
void for_cases(int world, double part, std::uint64_t seed,
               const std::function<void(const Case&)>& check);

/// The same in the extent of this run: the given part of one draw, or all of eight draws where
/// MESHLOOM_FULL is set.
void for_cases_of_run(int world, double part, const std::function<void(const Case&)>& check);

}  // namespace meshloom::parallel::exchange_sweep
