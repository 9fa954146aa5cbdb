#include "exchange_sweep.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "meshloom/core/random.h"

namespace meshloom::parallel::exchange_sweep {
namespace {

constexpr std::int64_t kHeadDim = 8;
constexpr double kScale = 0.35;

/// Where gradients of q and k vanish, as with windows of one token, rounding alone is left: a floor
/// keeps the ratio defined, well below the values of order one that all others have.
double worst(const at::Tensor& a, const at::Tensor& b, const at::Tensor& whole) {
  if (a.numel() == 0) return 0.0;
  constexpr double kFloor = 1e-3;
  const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble); };
  return wide(a).sub(wide(b)).abs().max().item<double>() /
         std::max(kFloor, wide(whole).abs().max().item<double>());
}

}  // namespace

at::Tensor random_tensor(const std::vector<std::int64_t>& shape, std::uint64_t seed,
                         at::ScalarType type) {
  auto tensor = at::empty(shape, at::TensorOptions().dtype(at::kDouble));
  auto* data = tensor.mutable_data_ptr<double>();
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    data[i] = random_normal(seed, static_cast<std::uint64_t>(i));
  }
  return tensor.to(type);
}

SampleLoader row_numbers(const std::vector<std::int64_t>& lengths) {
  return [lengths](std::int64_t id) {
    const auto begin = std::accumulate(lengths.begin(), lengths.begin() + id, std::int64_t{0});
    SampleTokens result;
    for (std::int64_t t = 0; t < lengths[static_cast<std::size_t>(id)]; ++t) {
      result.tokens.push_back(static_cast<std::int32_t>(begin + t));
    }
    return result;
  };
}

std::string Case::text() const {
  std::string result(plan::to_string(exchange));
  result += " group " + std::to_string(group) + ", heads " + std::to_string(heads) + "/" +
            std::to_string(kv_heads) + ", window " + std::to_string(window) + ", ranks";
  for (const int rank : ranks) result += " " + std::to_string(rank);
  result += ", lengths";
  for (const auto length : lengths) result += " " + std::to_string(length);
  return result;
}

plan::StepPlan Case::plan() const {
  plan::StepPlan plan;
  plan::Unit unit{
      .ranks = ranks, .samples = {}, .exchange = exchange, .ulysses_degree = group, .offload = 0.0};
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const auto id = static_cast<std::int64_t>(i);
    plan.samples.push_back({.id = id, .tokens = lengths[i], .loss_tokens = lengths[i] - 1});
    unit.samples.push_back(id);
  }
  plan.slots = {{.units = {unit}}};
  return plan;
}

plan::ExchangeShape Case::shape() const {
  const auto element = static_cast<std::int64_t>(c10::elementSize(type));
  const auto wire = wire_type ? static_cast<std::int64_t>(c10::elementSize(*wire_type)) : element;
  return {.heads = heads,
          .key_value_heads = kv_heads,
          .head_dim = kHeadDim,
          .window = window,
          .element_bytes = element,
          .wire_bytes = std::min(wire, element),
          .statistic_bytes = type == at::kDouble ? 8 : 4};
}

Whole::Whole(const Case& c) {
  const auto total = std::accumulate(c.lengths.begin(), c.lengths.end(), std::int64_t{0});
  q = random_tensor({total, c.heads, kHeadDim}, 1, c.type);
  k = random_tensor({total, c.kv_heads, kHeadDim}, 2, c.type);
  v = random_tensor({total, c.kv_heads, kHeadDim}, 3, c.type);
  dout = random_tensor({total, c.heads, kHeadDim}, 4, c.type);
  Case alone = c;
  alone.ranks = {0};
  const auto plan = alone.plan();
  const auto batch = build_batch(plan, plan.slots[0].units[0], 0, row_numbers(c.lengths), at::kCPU);
  const model::AttentionOptions options{.scale = kScale, .window = c.window};
  model::LocalAttention local;
  output = local.forward(q, k, v, batch, options);
  gradients = local.backward(dout, q, k, v, output, batch, options);
}

Found run(const comm::Communicator& hdp, const Case& c, const Whole& whole) {
  Found found;
  const auto own = std::find(c.ranks.begin(), c.ranks.end(), hdp.rank());
  if (own == c.ranks.end()) return found;
  const auto plan = c.plan();
  const plan::Unit& unit = plan.slots[0].units[0];
  const auto batch = build_batch(plan, unit, static_cast<int>(own - c.ranks.begin()),
                                 row_numbers(c.lengths), at::kCPU);
  const auto pick = [&](const at::Tensor& x) { return x.index_select(0, batch.tokens); };
  const auto compare = [&](const at::Tensor& given, const at::Tensor& expected) {
    found.error = std::max(found.error, worst(given, pick(expected), expected));
  };
  const auto sent = [&] { return hdp.traffic()["exchange"].sent_bytes; };
  const model::AttentionOptions options{.scale = kScale, .window = c.window};
  const auto exchange = make_exchange_factory({.wire_type = c.wire_type})(hdp, unit, {}, nullptr);
  const auto begin = sent();
  const auto out = exchange->forward(pick(whole.q), pick(whole.k), pick(whole.v), batch, options);
  const auto middle = sent();
  const auto gradients = exchange->backward(pick(whole.dout), pick(whole.q), pick(whole.k),
                                            pick(whole.v), out, batch, options);
  found.sent = {.forward = middle - begin, .backward = sent() - middle};
  compare(out.out, whole.output.out);
  const auto lse = out.lse.t();
  const auto whole_lse = whole.output.lse.t();
  found.error = std::max(found.error, worst(lse, pick(whole_lse), whole_lse));
  compare(gradients.dq, whole.gradients.dq);
  compare(gradients.dk, whole.gradients.dk);
  compare(gradients.dv, whole.gradients.dv);
  return found;
}

std::vector<std::pair<plan::Exchange, int>> exchanges_of(int degree) {
  if (degree == 1) return {{plan::Exchange::kLocal, 0}};
  std::vector<std::pair<plan::Exchange, int>> result{
      {plan::Exchange::kRing, 0}, {plan::Exchange::kAllGather, 0}, {plan::Exchange::kUlysses, 0}};
  for (int group = 1; group <= degree; ++group) {
    if (degree % group == 0) result.emplace_back(plan::Exchange::kRingUlysses, group);
  }
  return result;
}

void for_cases(int world, double part, std::uint64_t seed,
               const std::function<void(const Case&)>& check) {
  std::uint64_t number = 0;
  for (int degree = 1; degree <= world; ++degree) {
    for (const auto& [exchange, group] : exchanges_of(degree)) {
      for (const std::int64_t heads : {3, 7, 8}) {
        for (const std::int64_t kv_heads : {1, 2, 8}) {
          if (heads % kv_heads != 0) continue;
          for (const bool windowed : {false, true}) {
            const std::uint64_t key = random_key("exchange case", seed + number++);
            std::uint64_t draws = 0;
            const auto below = [&](std::int64_t n) {
              return static_cast<std::int64_t>(random_uniform(key, draws++) *
                                               static_cast<double>(n));
            };
            if (random_uniform(key, draws++) >= part) continue;
            Case c{.exchange = exchange,
                   .group = group,
                   .ranks = {},
                   .heads = heads,
                   .kv_heads = kv_heads,
                   .window = 0,
                   .lengths = {},
                   .type = at::kDouble,
                   .wire_type = std::nullopt};
            std::vector<int> axis(static_cast<std::size_t>(world));
            std::iota(axis.begin(), axis.end(), 0);
            for (int i = 0; i < degree; ++i) {
              const auto at = static_cast<std::size_t>(i + below(world - i));
              std::swap(axis[static_cast<std::size_t>(i)], axis[at]);
            }
            c.ranks.assign(axis.begin(), axis.begin() + degree);
            for (std::int64_t d = 0, documents = 1 + below(5); d < documents; ++d) {
              c.lengths.push_back(1 + below(below(2) == 0 ? 2 * degree + 2 : 130));
            }
            if (windowed) c.window = 1 + below(below(2) == 0 ? 8 : 100);
            check(c);
          }
        }
      }
    }
  }
}

void for_cases_of_run(int world, double part, const std::function<void(const Case&)>& check) {
  constexpr std::uint64_t kFullDraws = 8;
  constexpr std::uint64_t kDrawsApart = 1'000'000;
  if (std::getenv("MESHLOOM_FULL") == nullptr) {
    for_cases(world, part, 0, check);
    return;
  }
  for (std::uint64_t draw = 0; draw < kFullDraws; ++draw) {
    for_cases(world, 1.0, draw * kDrawsApart, check);
  }
}

}  // namespace meshloom::parallel::exchange_sweep
