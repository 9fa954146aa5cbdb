#include "meshloom/plan/exchange_choice.h"

#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "benchmarks/plan_lengths.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/plan/strategy.h"
#include "plan/internal/exchange_time.h"

namespace meshloom::plan {
namespace {

std::vector<int> ranks_below(int n) {
  std::vector<int> ranks(static_cast<std::size_t>(n));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

/// A 7B model with 8 K/V heads on a network that is neither free nor hopeless.
ExchangeModel model() {
  ExchangeModel model;
  model.shape = {.heads = 32,
                 .key_value_heads = 8,
                 .head_dim = 128,
                 .window = 0,
                 .element_bytes = 2,
                 .wire_bytes = 2,
                 .statistic_bytes = 4};
  model.layers = 32;
  model.forward_pair_seconds = 1.8e-11;  // [BS fig. 6]: 0.00925 ms of 1000^2 / 2 pairs
  model.backward_pair_seconds = 4.5e-11;
  model.inside = {.bandwidth = 200e9, .latency = 5e-6};
  model.between = {.bandwidth = 25e9, .latency = 15e-6};
  return model;
}

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return {};
}

TEST(ExchangeRules, ReadNamesDegreesAndTokens) {
  const auto rules = parse_exchange_rules("ring:2-4:-8192, ulysses:5-, ring_ulysses/4:8, auto");
  ASSERT_EQ(rules.size(), 4U);
  EXPECT_EQ(
      rules[0],
      (ExchangeRule{
          .exchange = Exchange::kRing, .least_degree = 2, .most_degree = 4, .most_tokens = 8192}));
  EXPECT_EQ(rules[1], (ExchangeRule{.exchange = Exchange::kUlysses, .least_degree = 5}));
  EXPECT_EQ(
      rules[2],
      (ExchangeRule{
          .exchange = Exchange::kRingUlysses, .group = 4, .least_degree = 8, .most_degree = 8}));
  EXPECT_EQ(rules[3], ExchangeRule{});
  EXPECT_TRUE(parse_exchange_rules("").empty());
}

TEST(ExchangeRules, RefuseWhatTheyCannotRead) {
  for (const auto& [text, words] : std::vector<std::pair<std::string, std::string>>{
           {"rings", "ring_ulysses"},
           {"ring:x", "the range of degrees is \"x\""},
           {"ring:4-2", "the smaller bound first"},
           {"ring:2:9-x", "the range of tokens"},
           {"ring:2:3:4", "\"4\" is left over"},
           {"ring/2", "none after other names"},
           {"ring_ulysses/1", "at least 2"},
           {"local", "expected ring"},
           {"ring,", "exchange \"\", expected ring"}}) {
    EXPECT_NE(message_of([&] { (void)parse_exchange_rules(text); }).find(words), std::string::npos)
        << text << ": " << message_of([&] { (void)parse_exchange_rules(text); });
  }
}

TEST(ExchangeChooser, CountsPairsLikeCounting) {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    std::uint64_t draw = 0;
    const auto below = [&](int n) {
      return static_cast<std::int64_t>(random_uniform(seed, draw++) * n);
    };
    const auto q = below(30);
    const auto k = below(30);
    const auto q_end = q + below(20);
    const auto k_end = k + below(20);
    const auto window = below(2) == 0 ? 0 : 1 + below(25);
    double counted = 0;
    for (auto p = q; p < q_end; ++p) {
      for (auto t = k; t < k_end; ++t) {
        if (t <= p && (window == 0 || p - t < window)) ++counted;
      }
    }
    EXPECT_DOUBLE_EQ(detail::pairs_between(q, q_end, k, k_end, window), counted)
        << q << " " << q_end << " " << k << " " << k_end << " " << window;
  }
}

TEST(ExchangeChooser, WithoutAModelStaysWithRing) {
  const ExchangeChooser chooser(std::nullopt, {});
  const std::vector<std::int64_t> lengths{100000};
  const auto choice = chooser.choose(lengths, ranks_below(4));
  EXPECT_EQ(choice.chosen.exchange, Exchange::kRing);
  EXPECT_TRUE(choice.candidates.empty());
}

TEST(ExchangeChooser, LongDocumentsHideARing) {
  // Attention of a quarter million tokens on each rank outlasts any transfer.
  const ExchangeChooser chooser(model(), {});
  const std::vector<std::int64_t> lengths{std::int64_t{1} << 20};
  const auto choice = chooser.choose(lengths, ranks_below(4));
  EXPECT_EQ(choice.chosen.exchange, Exchange::kRing);
  // What is left is the way home of the last gradients.
  EXPECT_LT(choice.chosen.exposed(), 0.01 * choice.chosen.seconds);
}

TEST(ExchangeChooser, FewTokensOnManyRanksPreferFewMessages) {
  auto slow = model();
  slow.inside.latency = 1e-3;  // a grouped call costs more than all its bytes
  const ExchangeChooser chooser(slow, {});
  const std::vector<std::int64_t> lengths{2048};
  EXPECT_EQ(chooser.choose(lengths, ranks_below(8)).chosen.exchange, Exchange::kAllGather);
}

TEST(ExchangeChooser, ManyHeadsOnASlowNetworkPreferUlysses) {
  // Bytes of a ring grow with the degree, those of an exchange of heads don't; K/V heads as many
  // as query heads make the ring's largest.
  auto slow = model();
  slow.shape.key_value_heads = 32;
  slow.inside.bandwidth = 1e9;
  const ExchangeChooser chooser(slow, {});
  const std::vector<std::int64_t> lengths{16384};
  EXPECT_EQ(chooser.choose(lengths, ranks_below(32)).chosen.exchange, Exchange::kUlysses);
}

TEST(ExchangeChooser, HeadsInsideNodesAndRingsBetweenThem) {
  auto nodes = model();
  nodes.ranks_per_node = 8;
  nodes.between = {.bandwidth = 2e9, .latency = 15e-6};
  const ExchangeChooser chooser(nodes, {});
  const std::vector<std::int64_t> lengths{131072};
  const auto choice = chooser.choose(lengths, ranks_below(32));
  EXPECT_EQ(choice.chosen.exchange, Exchange::kRingUlysses);
  EXPECT_EQ(choice.chosen.group, 8);
}

TEST(ExchangeChooser, RulesComeBeforeTheModel) {
  const ExchangeChooser chooser(
      model(), parse_exchange_rules("all_gather:-4,auto:6,ring_ulysses/2:-:-4096,ulysses"));
  const std::vector<std::int64_t> lengths{std::int64_t{1} << 20};
  const std::vector<std::int64_t> few{4096};
  EXPECT_EQ(chooser.choose(lengths, ranks_below(4)).chosen.exchange, Exchange::kAllGather);
  EXPECT_TRUE(chooser.choose(lengths, ranks_below(4)).by_rule);
  EXPECT_EQ(chooser.choose(lengths, ranks_below(6)).chosen.exchange, Exchange::kRing);
  EXPECT_FALSE(chooser.choose(lengths, ranks_below(6)).by_rule);
  EXPECT_EQ(chooser.choose(lengths, ranks_below(8)).chosen.exchange, Exchange::kUlysses);
  EXPECT_EQ(chooser.choose(few, ranks_below(8)).chosen.group, 2);
  // 7 has no head group of 2: the rule does not apply.
  EXPECT_EQ(chooser.choose(few, ranks_below(7)).chosen.exchange, Exchange::kUlysses);
}

TEST(ExchangeChooser, PlansCarryTheChoice) {
  auto problem = PlanProblem::from_lengths({48000, 500, 600}, {.hdp = 8}, 8192);
  problem.exchange_rules = parse_exchange_rules("ring_ulysses:-:10000-");
  const auto chosen = make_plan(problem, "naive_hdp");
  int sliced = 0;
  for (const auto& slot : chosen.slots) {
    for (const auto& unit : slot.units) {
      if (unit.ranks.size() < 2) continue;
      ++sliced;
      EXPECT_EQ(unit.ranks.size() % static_cast<std::size_t>(unit.ulysses_degree), 0U);
    }
  }
  EXPECT_GT(sliced, 0);
  problem.exchange_rules.clear();
  problem.exchange = model();
  const auto measured = make_plan(problem, "naive_hdp");
  EXPECT_EQ(measured, StepPlan::from_json(measured.to_json()));
  const ExchangeChooser chooser(problem.exchange, {});
  EXPECT_NE(chooser.table(measured).find("all_gather"), std::string::npos);
}

TEST(ExchangeChooser, RefusesFiguresThatAreNone) {
  auto broken = model();
  broken.between.bandwidth = 0.0;
  EXPECT_NE(message_of([&] { ExchangeChooser(broken, {}); }).find("between.bandwidth is 0"),
            std::string::npos);
  broken = model();
  broken.shape.key_value_heads = 5;
  EXPECT_NE(message_of([&] { ExchangeChooser(broken, {}); }).find("divisor of 32"),
            std::string::npos);
}

TEST(ExchangeTraffic, ProductionMixSendsLessThanHalfOfFixedContextParallelism) {
  constexpr double kMostOfFixed = 0.5;
  const auto shape = model().shape;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    auto problem =
        PlanProblem::from_lengths(benchmarks::production_mix(8 << 20, seed), {.hdp = 64}, 32768);
    const auto sent = [&](const char* strategy) {
      const auto bytes = exchange_bytes(make_plan(problem, strategy), shape);
      return static_cast<double>(bytes.forward + bytes.backward);
    };
    EXPECT_LE(sent("balanced"), kMostOfFixed * sent("static")) << "draw " << seed;
  }
}

}  // namespace
}  // namespace meshloom::plan
