#include "plan/internal/exchange_time.h"

#include <algorithm>

#include "meshloom/plan/exchange_route.h"
#include "meshloom/plan/slicing.h"

namespace meshloom::plan {
namespace detail {
namespace {

/// Members looked at to find the busiest of a step; member 0, which attends to most, is one.
constexpr int kReaders = 8;
constexpr double kBackwardExpansions = 3.0;

/// Pairs with key <= query - shift.
double pairs_behind(std::int64_t query_begin, std::int64_t query_end, std::int64_t key_begin,
                    std::int64_t key_end, std::int64_t shift) {
  // A query at p sees clamp(p - shift - key_begin + 1, 0, keys) of them.
  const double keys = static_cast<double>(key_end - key_begin);
  const double first = static_cast<double>(query_begin - shift - key_begin + 1);
  const double last = static_cast<double>(query_end - shift - key_begin);
  if (keys <= 0.0 || query_end <= query_begin || last <= 0.0) return 0.0;
  const auto triangle = [](double n) { return n <= 0.0 ? 0.0 : 0.5 * n * (n + 1.0); };
  const double all = triangle(last) - triangle(std::max(first, 1.0) - 1.0);
  const double beyond = triangle(last - keys) - triangle(std::max(first, 1.0) - 1.0 - keys);
  return all - beyond;
}

/// What the busiest members of a ring compute and receive, step by step.
struct RingProfile {
  std::vector<double> pairs;  ///< [step]
  std::vector<double> rows;   ///< [step], of keys and values; 0 for step 0
  double rows_in_all = 0.0;   ///< received by one member
};

RingProfile profile_of(std::span<const std::int64_t> lengths, int degree, std::int64_t window) {
  const auto size = static_cast<std::size_t>(degree);
  RingProfile profile{.pairs = std::vector<double>(size, 0.0),
                      .rows = std::vector<double>(size, 0.0)};
  // Without a window a document that fills its chunks is the same in every step, for all members:
  // two chunks of queries against two of keys, half of them behind; member 0 receives both.
  std::vector<std::int64_t> uneven;
  double even_pairs = 0.0;
  double even_rows = 0.0;
  for (const std::int64_t tokens : lengths) {
    if (window > 0 || tokens < 2 * static_cast<std::int64_t>(degree)) {
      uneven.push_back(tokens);
      continue;
    }
    const double chunk = 0.5 * static_cast<double>(tokens) / degree;
    even_pairs += 2.0 * chunk * chunk;
    even_rows += 2.0 * chunk;
  }
  const int readers = uneven.empty() ? 0 : std::min(degree, kReaders);
  for (int i = 0; i < readers; ++i) {
    const int reader = i * degree / readers;
    double received = 0.0;
    for (int step = 0; step < degree; ++step) {
      const int owner = (reader + degree - step) % degree;
      double pairs = 0.0;
      std::int64_t rows = 0;
      for (const std::int64_t tokens : uneven) {
        const auto queries = member_ranges(tokens, degree, reader);
        for (const TokenRange& keys : member_ranges(tokens, degree, owner)) {
          for (const TokenRange& query : queries) {
            pairs += pairs_between(query.begin, query.end, keys.begin, keys.end, window);
          }
        }
        if (step == 0) continue;
        for (const int chunk : {owner, 2 * degree - 1 - owner}) {
          rows += needed_rows(tokens, degree, chunk, reader, window);
        }
      }
      const auto at = static_cast<std::size_t>(step);
      profile.pairs[at] = std::max(profile.pairs[at], pairs);
      profile.rows[at] = std::max(profile.rows[at], static_cast<double>(rows));
      received += static_cast<double>(rows);
    }
    profile.rows_in_all = std::max(profile.rows_in_all, received);
  }
  for (std::size_t step = 0; step < size; ++step) {
    profile.pairs[step] += even_pairs;
    if (step > 0) profile.rows[step] += even_rows;
  }
  profile.rows_in_all += even_rows * (degree - 1);
  return profile;
}

/// Seconds of a layer's forward or backward, and those of its kernels alone.
struct Pass {
  double seconds = 0.0;
  double computed = 0.0;

  void add(double compute, double transfer) {
    seconds += std::max(compute, transfer);
    computed += compute;
  }
};

struct Passes {
  Pass forward;
  Pass backward;
};

/// The ports of one rank: what is sent to ranks of its node and to others is under way together.
class Ports {
 public:
  Ports(const ExchangeModel& model, std::span<const int> ranks) : model_(model), ranks_(ranks) {}

  /// Every member `stride` places from the next, in a ring: the slowest edge.
  [[nodiscard]] double ring(double bytes, int stride) const {
    if (bytes <= 0.0) return 0.0;
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      const auto next = (i + static_cast<std::size_t>(stride)) % ranks_.size();
      if (node(ranks_[i]) != node(ranks_[next])) return seconds(model_.between, bytes);
    }
    return seconds(model_.inside, bytes);
  }
  /// One member of a group to all others, `bytes` in all: the member with most of it between nodes.
  [[nodiscard]] double group(double bytes, int members) const {
    if (bytes <= 0.0 || members < 2) return 0.0;
    double worst = 0.0;
    const auto size = static_cast<std::size_t>(members);
    for (std::size_t begin = 0; begin + size <= ranks_.size(); begin += size) {
      const auto all = ranks_.subspan(begin, size);
      for (const int rank : all) {
        const auto near = std::count_if(all.begin(), all.end(),
                                        [&](int other) { return node(other) == node(rank); });
        const double share = static_cast<double>(near - 1) / (members - 1);
        const double time =
            std::max(share > 0.0 ? seconds(model_.inside, bytes * share) : 0.0,
                     share < 1.0 ? seconds(model_.between, bytes * (1.0 - share)) : 0.0);
        worst = std::max(worst, time);
        if (near == members) break;  // the others of this node see the same
      }
    }
    return worst;
  }

 private:
  static double seconds(const LinkFigures& link, double bytes) {
    return link.latency + bytes / link.bandwidth;
  }
  [[nodiscard]] int node(int rank) const {
    return model_.ranks_per_node > 0 ? rank / model_.ranks_per_node : 0;
  }
  const ExchangeModel& model_;
  std::span<const int> ranks_;
};

/// Times of one unit.
class UnitClock {
 public:
  UnitClock(const ExchangeModel& model, std::span<const std::int64_t> lengths,
            std::span<const int> ranks)
      : model_(model),
        lengths_(lengths),
        degree_(static_cast<int>(ranks.size())),
        ports_(model, ranks) {
    for (const std::int64_t tokens : lengths) {
      tokens_ += static_cast<double>(tokens);
    }
  }

  [[nodiscard]] ExchangeCandidate of(Exchange exchange, int group) const {
    ExchangeCandidate result{.exchange = exchange, .group = group};
    result.bytes = exchange_bytes(lengths_, degree_, exchange, group, model_.shape);
    const int members = exchange == Exchange::kUlysses ? degree_ : std::max(group, 1);
    const bool gathers = exchange == Exchange::kAllGather;
    Passes passes = gathers ? gather() : ring(members);
    if (!gathers) add_heads_(passes, members);
    result.seconds = passes.forward.seconds + passes.backward.seconds;
    result.exposed_forward = passes.forward.seconds - passes.forward.computed;
    result.exposed_backward = passes.backward.seconds - passes.backward.computed;
    return result;
  }

 private:
  /// Of a block row on the wire with `kv` heads: keys and values, or their gradients.
  [[nodiscard]] double key_bytes(double kv) const {
    return 2.0 * kv * static_cast<double>(model_.shape.head_dim * model_.shape.wire_bytes);
  }
  [[nodiscard]] double gradient_bytes(double kv) const {
    return 2.0 * kv * static_cast<double>(model_.shape.head_dim * model_.shape.statistic_bytes);
  }
  [[nodiscard]] double copy(double bytes) const {
    return model_.copy_bandwidth > 0.0 ? bytes / model_.copy_bandwidth : 0.0;
  }
  /// The largest part of the heads when `members` share them.
  [[nodiscard]] HeadShare largest(int members) const {
    HeadShare most;
    for (int part = 0; part < members; ++part) {
      const HeadShare share =
          head_share(model_.shape.heads, model_.shape.key_value_heads, members, part);
      most.q_end = std::max(most.q_end, share.q());
      most.kv_end = std::max(most.kv_end, share.kv());
    }
    return most;
  }

  [[nodiscard]] Passes gather() const {
    const RingProfile profile = profile_of(lengths_, degree_, model_.shape.window);
    const double values =
        profile.rows_in_all * static_cast<double>(model_.shape.row_elements(
                                  Exchange::kAllGather, model_.shape.key_value_heads));
    const double keys = values * static_cast<double>(model_.shape.wire_bytes);
    const double gradients = values * static_cast<double>(model_.shape.statistic_bytes);
    const double expanded =
        model_.shape.latent_dim > 0 ? profile.rows_in_all * model_.expand_seconds : 0.0;
    double later = 0.0;
    for (std::size_t s = 1; s < profile.pairs.size(); ++s) later += profile.pairs[s];
    const double own = profile.pairs[0];
    const double moved = ports_.group(keys, degree_);
    const double half = 0.5 * own * model_.backward_pair_seconds;
    Passes passes;
    passes.forward.add(own * model_.forward_pair_seconds, moved);
    passes.forward.add(later * model_.forward_pair_seconds, 0.0);
    passes.forward.add(0.0, expanded + copy(keys));
    passes.backward.add(half, moved);
    passes.backward.add(later * model_.backward_pair_seconds, 0.0);
    passes.backward.add(half, ports_.group(gradients, degree_));
    // Made again, and two products for their gradients.
    passes.backward.add(0.0, kBackwardExpansions * expanded + copy(keys + gradients));
    return passes;
  }

  /// Rings of degree / members, each with the largest part of the heads; local attention where that
  /// is one. Backward keeps half of the own keys for the way home of the last gradients.
  [[nodiscard]] Passes ring(int members) const {
    const int degree = degree_ / members;
    const HeadShare share = largest(members);
    const double part = static_cast<double>(share.q()) / static_cast<double>(model_.shape.heads);
    const double forward = part * model_.forward_pair_seconds;
    const double backward = part * model_.backward_pair_seconds;
    const auto kv = static_cast<double>(share.kv());
    const RingProfile profile = profile_of(lengths_, degree, model_.shape.window);
    Passes passes;
    double finished = 0.0;  // rows whose gradients leave in the call
    for (std::size_t s = 0; s < profile.pairs.size(); ++s) {
      const double next = s + 1 < profile.rows.size() ? profile.rows[s + 1] : 0.0;
      const double pairs = degree > 1 && s == 0 ? 0.5 * profile.pairs[0] : profile.pairs[s];
      const double keys = next * key_bytes(kv);
      passes.forward.add(profile.pairs[s] * forward, ports_.ring(keys, members));
      passes.backward.add(pairs * backward,
                          ports_.ring(keys + finished * gradient_bytes(kv), members));
      finished = s == 0 ? 0.0 : profile.rows[s];
    }
    if (degree > 1) {
      passes.backward.add(0.5 * profile.pairs[0] * backward,
                          ports_.ring(finished * gradient_bytes(kv), members));
    }
    return passes;
  }

  /// Heads against tokens and back, in forward and in backward; nothing hides it.
  void add_heads_(Passes& passes, int members) const {
    if (members < 2) return;
    const ExchangeShape& shape = model_.shape;
    const HeadShare share = largest(members);
    const double rows = tokens_ / degree_ * (members - 1);  // received for the own heads
    const auto dim = static_cast<double>(shape.head_dim);
    const auto q = static_cast<double>(share.q());
    const double query = q * dim * static_cast<double>(shape.element_bytes);
    const double keys = key_bytes(static_cast<double>(share.kv()));
    const double sums = q * static_cast<double>(shape.statistic_bytes);
    const double gradients = q * dim * static_cast<double>(shape.statistic_bytes) +
                             gradient_bytes(static_cast<double>(share.kv()));
    const auto add = [&](Pass& pass, double bytes) {
      pass.add(0.0, ports_.group(bytes, members) + copy(3.0 * bytes));
    };
    add(passes.forward, rows * (query + keys));
    add(passes.forward, rows * (query + sums));
    add(passes.backward, rows * (2.0 * query + keys + 2.0 * sums));
    add(passes.backward, rows * gradients);
  }

  const ExchangeModel& model_;
  std::span<const std::int64_t> lengths_;
  int degree_;
  Ports ports_;
  double tokens_ = 0.0;
};

}  // namespace

double pairs_between(std::int64_t query_begin, std::int64_t query_end, std::int64_t key_begin,
                     std::int64_t key_end, std::int64_t window) {
  const double behind = pairs_behind(query_begin, query_end, key_begin, key_end, 0);
  if (window == 0) return behind;
  return behind - pairs_behind(query_begin, query_end, key_begin, key_end, window);
}

}  // namespace detail

ExchangeCandidate predict_exchange(const ExchangeModel& model,
                                   std::span<const std::int64_t> lengths,
                                   std::span<const int> ranks, Exchange exchange, int group) {
  return detail::UnitClock(model, lengths, ranks).of(exchange, group);
}

namespace detail {

std::vector<ExchangeCandidate> candidates(const ExchangeModel& model,
                                          std::span<const std::int64_t> lengths,
                                          std::span<const int> ranks) {
  const UnitClock clock(model, lengths, ranks);
  const auto degree = static_cast<int>(ranks.size());
  std::vector<ExchangeCandidate> result{clock.of(Exchange::kRing, 0),
                                        clock.of(Exchange::kAllGather, 0),
                                        clock.of(Exchange::kUlysses, 0)};
  for (int group = 2; group < degree; ++group) {
    if (degree % group == 0) result.push_back(clock.of(Exchange::kRingUlysses, group));
  }
  return result;
}

}  // namespace detail
}  // namespace meshloom::plan
