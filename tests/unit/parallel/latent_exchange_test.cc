// Exchanges of keys and values that are made from latents, against one process.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <vector>

#include "exchange_sweep.h"
#include "meshloom/comm/backends.h"
#include "meshloom/parallel/sample_batch.h"

namespace meshloom::parallel::latent_exchange {
namespace {

using exchange_sweep::Case;
using exchange_sweep::random_tensor;
using exchange_sweep::row_numbers;

constexpr std::int64_t kLatent = 5;
constexpr std::int64_t kHeads = 3;
constexpr std::int64_t kKeyDim = 6;
constexpr std::int64_t kValueDim = 8;
constexpr double kTolerance = 1e-12;  // fp64, of each tensor's largest element

/// Keys and values as products of the rows with two weights.
class Products final : public model::LatentKeys {
 public:
  explicit Products(at::Tensor rows)
      : rows_(std::move(rows)),
        keys_(random_tensor({kLatent, kHeads * kKeyDim}, 11)),
        values_(random_tensor({kLatent, kHeads * kValueDim}, 12)),
        dkeys_(at::zeros_like(keys_)),
        dvalues_(at::zeros_like(values_)) {}

  [[nodiscard]] const at::Tensor& rows() const override { return rows_; }
  [[nodiscard]] model::KeysAndValues expand(const at::Tensor& rows) const override {
    return {rows.mm(keys_).view({-1, kHeads, kKeyDim}),
            rows.mm(values_).view({-1, kHeads, kValueDim})};
  }
  [[nodiscard]] at::Tensor contract(const at::Tensor& rows, const at::Tensor& dk,
                                    const at::Tensor& dv) override {
    dkeys_.addmm_(rows.t(), dk.flatten(1));
    dvalues_.addmm_(rows.t(), dv.flatten(1));
    return dk.flatten(1).mm(keys_.t()) + dv.flatten(1).mm(values_.t());
  }
  [[nodiscard]] at::Tensor weight_gradients() const {
    return at::cat({dkeys_.flatten(), dvalues_.flatten()});
  }

 private:
  at::Tensor rows_;
  at::Tensor keys_;
  at::Tensor values_;
  at::Tensor dkeys_;
  at::Tensor dvalues_;
};

double worst(const at::Tensor& given, const at::Tensor& expected, const at::Tensor& whole) {
  if (given.numel() == 0) return 0.0;
  return given.sub(expected).abs().max().item<double>() / whole.abs().max().item<double>();
}

struct Whole {
  at::Tensor q, rows, dout;
  model::AttentionOutput output;
  model::LatentGradients gradients;
  at::Tensor weights;
};

Whole solve_alone(Case c, const model::AttentionOptions& options) {
  const auto total = std::accumulate(c.lengths.begin(), c.lengths.end(), std::int64_t{0});
  c.ranks = {0};
  const auto plan = c.plan();
  const auto batch = build_batch(plan, plan.slots[0].units[0], 0, row_numbers(c.lengths), at::kCPU);
  Whole whole{.q = random_tensor({total, kHeads, kKeyDim}, 1),
              .rows = random_tensor({total, kLatent}, 2),
              .dout = random_tensor({total, kHeads, kValueDim}, 3)};
  Products keys(whole.rows);
  model::LocalAttention local;
  whole.output = local.forward_latent(whole.q, keys, batch, options);
  whole.gradients = local.backward_latent(whole.dout, whole.q, keys, whole.output, batch, options);
  whole.weights = keys.weight_gradients();
  return whole;
}

void expect_one_process(const Case& c) {
  SCOPED_TRACE(c.text());
  const model::AttentionOptions options{.scale = 0.35, .window = c.window};
  const Whole whole = solve_alone(c, options);
  plan::ExchangeShape shape = c.shape();
  shape.heads = shape.key_value_heads = kHeads;
  shape.head_dim = kValueDim;  // the wider one
  shape.latent_dim = kLatent;
  const auto degree = static_cast<int>(c.ranks.size());
  const plan::ExchangeBytes expected =
      plan::exchange_bytes(c.lengths, degree, c.exchange, c.group, shape);
  std::mutex mutex;
  std::int64_t sent = 0;
  comm::run_thread_ranks(degree, [&](comm::Communicator hdp) {
    const auto plan = c.plan();
    const plan::Unit& unit = plan.slots[0].units[0];
    const auto batch = build_batch(plan, unit, hdp.rank(), row_numbers(c.lengths), at::kCPU);
    const auto pick = [&](const at::Tensor& x) { return x.index_select(0, batch.tokens); };
    const auto exchange = make_exchange(hdp, unit, {});
    Products keys(pick(whole.rows));
    const at::Tensor q = pick(whole.q);
    const auto out = exchange->forward_latent(q, keys, batch, options);
    const auto gradients =
        exchange->backward_latent(pick(whole.dout), q, keys, out, batch, options);
    at::Tensor weights = keys.weight_gradients();
    hdp.all_reduce_(weights).wait();
    const std::lock_guard lock(mutex);
    sent += hdp.traffic()["exchange"].sent_bytes;
    EXPECT_LE(worst(out.out, pick(whole.output.out), whole.output.out), kTolerance);
    EXPECT_LE(worst(gradients.dq, pick(whole.gradients.dq), whole.gradients.dq), kTolerance);
    EXPECT_LE(worst(gradients.drows, pick(whole.gradients.drows), whole.gradients.drows),
              kTolerance);
    EXPECT_LE(worst(weights, whole.weights, whole.weights), kTolerance);
  });
  EXPECT_EQ(sent, expected.forward + expected.backward);
}

TEST(LatentExchange, EqualsOneProcessAndSendsTheClosedForm) {
  for (const int degree : {1, 2, 3, 5, 8}) {
    Case c;
    c.ranks.resize(static_cast<std::size_t>(degree));
    std::iota(c.ranks.begin(), c.ranks.end(), 0);
    c.lengths = {37, 1, 64, 5};
    for (const auto& [exchange, group] : exchange_sweep::exchanges_of(degree)) {
      c.exchange = exchange;
      c.group = group;
      for (const std::int64_t window : {0, 9}) {
        c.window = window;
        expect_one_process(c);
      }
    }
  }
}

TEST(LatentExchange, LatentsAreFewerBytesThanKeysAndValues) {
  // DeepSeek-V3's: 128 heads of 192 and 128, latents of 512 and 64.
  plan::ExchangeShape shape{.heads = 128, .key_value_heads = 128, .head_dim = 192};
  const std::vector<std::int64_t> lengths{65536};
  const auto keys = plan::exchange_bytes(lengths, 8, plan::Exchange::kAllGather, 0, shape);
  shape.latent_dim = 576;
  const auto latents = plan::exchange_bytes(lengths, 8, plan::Exchange::kAllGather, 0, shape);
  EXPECT_EQ(keys.forward * 576, latents.forward * 2 * 128 * 192);
  EXPECT_EQ(keys.forward,
            plan::exchange_bytes(lengths, 8, plan::Exchange::kRing, 0, shape).forward);
}

}  // namespace
}  // namespace meshloom::parallel::latent_exchange
