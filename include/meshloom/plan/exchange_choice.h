#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/plan/exchange_traffic.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// One direction of a rank's port: a message of b bytes takes latency + b / bandwidth, and messages
/// that share the port go one after another.
struct LinkFigures {
  double bandwidth = 0.0;  ///< bytes per second, > 0
  double latency = 0.0;    ///< seconds of a grouped call
  friend bool operator==(const LinkFigures&, const LinkFigures&) = default;
};

/// What choosing an exchange needs to know of model and machine, beside the unit.
struct MESHLOOM_API ExchangeModel {
  ExchangeShape shape;
  int layers = 1;
  /// Seconds of the attention kernel for one query-key pair in one layer, all heads; forward, and
  /// backward.
  double forward_pair_seconds = 0.0;
  double backward_pair_seconds = 0.0;
  /// Seconds of making one token's keys and values from latents; 0 without.
  double expand_seconds = 0.0;
  LinkFigures inside;   ///< between ranks of a node
  LinkFigures between;  ///< between nodes
  /// Bytes per second of packing messages; 0: free.
  double copy_bandwidth = 0.0;
  int ranks_per_node = 0;  ///< HDP ranks; 0: one node

  /// @throws InvalidArgument  names the field and what it may be.
  void validate() const;
  friend bool operator==(const ExchangeModel&, const ExchangeModel&) = default;
};

/// An exchange for units of some sizes. The first rule that applies to a unit wins.
struct ExchangeRule {
  std::optional<Exchange> exchange;  ///< none: by the cost model
  int group = 0;                     ///< ulysses_degree; 0: the best one
  int least_degree = 2;
  int most_degree = std::numeric_limits<int>::max();
  std::int64_t least_tokens = 0;  ///< of the whole unit
  std::int64_t most_tokens = std::numeric_limits<std::int64_t>::max();
  friend bool operator==(const ExchangeRule&, const ExchangeRule&) = default;
};

/// Reads `NAME[:DEGREES[:TOKENS]],...`: NAME is ring, all_gather, ulysses, ring_ulysses,
/// ring_ulysses/U or auto; ranges are `a-b`, `a-`, `-b`, `a` or empty, bounds included. As in
/// `ring:2-4:-8192,ulysses:5-`. An empty text gives no rules.
/// @throws InvalidArgument  names the rule and what is wrong in it.
[[nodiscard]] MESHLOOM_API std::vector<ExchangeRule> parse_exchange_rules(std::string_view text);

/// One way of moving a unit's keys and values, as predicted for one layer.
struct ExchangeCandidate {
  Exchange exchange = Exchange::kRing;
  int group = 0;  ///< ulysses_degree, with ring_ulysses only
  ExchangeBytes bytes{};
  double seconds = 0.0;  ///< forward and backward of attention with its exchange
  /// Of that, what transfer adds to the kernels.
  double exposed_forward = 0.0;
  double exposed_backward = 0.0;
  [[nodiscard]] double exposed() const { return exposed_forward + exposed_backward; }
};

/// @param lengths  tokens of the unit's documents @param ranks  at least two
/// @param group  ulysses_degree, with ring_ulysses only: a divisor of the number of ranks
[[nodiscard]] MESHLOOM_API ExchangeCandidate predict_exchange(const ExchangeModel& model,
                                                              std::span<const std::int64_t> lengths,
                                                              std::span<const int> ranks,
                                                              Exchange exchange, int group);

struct ExchangeChoice {
  ExchangeCandidate chosen;
  bool by_rule = false;
  std::vector<ExchangeCandidate> candidates;  ///< empty without a model; ring first
};

/// Chooses how the ranks of a unit share keys and values: by rule, else the least predicted time,
/// else (without a model) ring. A pure function of what it is given. Thread safe.
class MESHLOOM_API ExchangeChooser {
 public:
  /// @throws InvalidArgument  the model is malformed.
  ExchangeChooser(std::optional<ExchangeModel> model, std::vector<ExchangeRule> rules);

  /// @param lengths  tokens of the unit's documents @param ranks  at least two
  [[nodiscard]] ExchangeChoice choose(std::span<const std::int64_t> lengths,
                                      std::span<const int> ranks) const;

  /// Sets the exchange of every unit of more than one rank that a strategy left at `ring`.
  void apply_(std::vector<Slot>& slots, const std::vector<SampleInfo>& samples) const;

  /// Why these exchanges: a line for the largest unit of every degree in the plan, with bytes and
  /// predicted milliseconds of all layers for every candidate. Empty where no unit has two ranks,
  /// or where there was nothing to choose by.
  [[nodiscard]] std::string table(const StepPlan& plan) const;

 private:
  std::optional<ExchangeModel> model_;
  std::vector<ExchangeRule> rules_;
};

}  // namespace meshloom::plan
