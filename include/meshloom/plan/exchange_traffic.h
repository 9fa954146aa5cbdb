#pragma once

#include <cstdint>
#include <span>

#include "meshloom/core/export.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// What attention of one layer moves, per token.
struct MESHLOOM_API ExchangeShape {
  std::int64_t heads = 1;
  std::int64_t key_value_heads = 1;  ///< divides `heads`
  std::int64_t head_dim = 1;
  /// Numbers a token that keys and values of all heads are made from (latent attention), which is
  /// what all_gather moves then; 0: keys and values themselves.
  std::int64_t latent_dim = 0;
  std::int64_t window = 0;         ///< tokens a query sees; 0: all before it
  std::int64_t element_bytes = 2;  ///< of queries, keys, values and outputs
  std::int64_t wire_bytes = 2;     ///< of keys and values on their way
  /// Of log-sum-exp and of gradients on their way, which are sums: 4, or 8 for fp64.
  std::int64_t statistic_bytes = 4;

  /// @throws InvalidArgument  names the field and what it may be.
  void validate() const;
  /// Numbers of a row of `kv_heads` heads on its way.
  [[nodiscard]] std::int64_t row_elements(Exchange exchange, std::int64_t kv_heads) const {
    const bool latents = exchange == Exchange::kAllGather && latent_dim > 0;
    return latents ? latent_dim : 2 * kv_heads * head_dim;
  }
  friend bool operator==(const ExchangeShape&, const ExchangeShape&) = default;
};

/// Query heads [q_begin, q_end) of a layer and the K/V heads that they read.
struct HeadShare {
  std::int64_t q_begin = 0;
  std::int64_t q_end = 0;
  std::int64_t kv_begin = 0;
  std::int64_t kv_end = 0;
  [[nodiscard]] std::int64_t q() const { return q_end - q_begin; }
  [[nodiscard]] std::int64_t kv() const { return kv_end - kv_begin; }
};

/// Part `part` of `parts`: query heads [floor(part H / parts), floor((part + 1) H / parts)). Parts
/// need not divide the heads; where there are more parts than heads some are empty.
[[nodiscard]] MESHLOOM_API HeadShare head_share(std::int64_t heads, std::int64_t key_value_heads,
                                                int parts, int part);

/// Bytes that all members of a unit send for one layer.
struct ExchangeBytes {
  std::int64_t forward = 0;
  std::int64_t backward = 0;
  friend bool operator==(const ExchangeBytes&, const ExchangeBytes&) = default;
};

/// The closed forms: exactly what the exchanges of `parallel` send.
/// @param lengths  tokens of each document of the unit
/// @param ulysses_degree  with ring_ulysses only: members of a head group, a divisor of `degree`
/// @throws InvalidArgument  a malformed shape, degree or ulysses_degree.
[[nodiscard]] MESHLOOM_API ExchangeBytes exchange_bytes(std::span<const std::int64_t> lengths,
                                                        int degree, Exchange exchange,
                                                        int ulysses_degree,
                                                        const ExchangeShape& shape);
/// Of all units of a plan.
[[nodiscard]] MESHLOOM_API ExchangeBytes exchange_bytes(const StepPlan& plan,
                                                        const ExchangeShape& shape);

}  // namespace meshloom::plan
