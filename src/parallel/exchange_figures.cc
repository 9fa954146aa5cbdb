#include "meshloom/parallel/exchange_figures.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <iterator>
#include <utility>

#include "meshloom/model/attention_exchange.h"
#include "meshloom/model/ops.h"

namespace meshloom::parallel {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRounds = 5;
constexpr std::int64_t kCpuTokens = 256;
constexpr std::int64_t kDeviceTokens = 4096;
constexpr std::int64_t kSmallBytes = 64;
constexpr std::int64_t kLargeBytes = std::int64_t{2} << 20;
/// Below this a clock's steps count.
constexpr double kLeastSeconds = 1e-9;

/// The median of some runs after one that warms up. @param settle  ends what runs on a device
double median_seconds(const std::function<void()>& body, const std::function<void()>& settle) {
  std::array<double, kRounds> seconds{};
  body();
  for (double& time : seconds) {
    settle();
    const auto begin = Clock::now();
    body();
    settle();
    time = std::chrono::duration<double>(Clock::now() - begin).count();
  }
  std::sort(seconds.begin(), seconds.end());
  return std::max(kLeastSeconds, seconds[kRounds / 2]);
}

/// A ring over all ranks, each sending to the rank `distance` places on.
double ring_seconds(comm::Communicator& hdp, int distance, std::int64_t bytes, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kByte).device(device);
  const at::Tensor sent = at::ones({bytes}, options);
  const at::Tensor received = at::empty({bytes}, options);
  const comm::Transfer send{.peer = (hdp.rank() + distance) % hdp.size(), .tensor = &sent};
  const comm::Transfer receive{.peer = (hdp.rank() + hdp.size() - distance) % hdp.size(),
                               .tensor = &received};
  return median_seconds(
      [&] {
        hdp.send_receive({&send, 1}, {&receive, 1}, {.timeout = std::nullopt, .purpose = "measure"})
            .wait();
      },
      [] {});
}

plan::LinkFigures link(comm::Communicator& hdp, int distance, at::Device device) {
  const double small = ring_seconds(hdp, distance, kSmallBytes, device);
  const double large = ring_seconds(hdp, distance, kLargeBytes, device);
  const double rest = std::max(large - small, 0.01 * large);
  return {.bandwidth = static_cast<double>(kLargeBytes - kSmallBytes) / rest, .latency = small};
}

}  // namespace

plan::ExchangeModel measure_exchange(comm::Communicator& hdp, const ExchangeMeasurement& what) {
  what.shape.validate();
  plan::ExchangeModel result;
  result.shape = what.shape;
  result.layers = what.layers;
  result.ranks_per_node = what.ranks_per_node;

  const std::int64_t tokens = what.device.is_cpu() ? kCpuTokens : kDeviceTokens;
  const auto options = at::TensorOptions().dtype(what.type).device(what.device);
  const plan::ExchangeShape& shape = what.shape;
  const at::Tensor q = at::ones({tokens, shape.heads, shape.head_dim}, options);
  const at::Tensor k = at::ones({tokens, shape.key_value_heads, shape.head_dim}, options);
  model::SequenceBatch batch;
  batch.tokens = at::ones({tokens}, at::TensorOptions().dtype(at::kLong));
  batch.documents.push_back(
      {.sample = 0, .length = tokens, .ranges = {plan::TokenRange{0, tokens}, {tokens, tokens}}});
  const model::AttentionOptions attention{.scale = 1.0 / static_cast<double>(shape.head_dim)};
  model::LocalAttention local;
  model::AttentionOutput out;
  // Reading an element waits for the device.
  const auto settle = [&] { (void)q.select(0, 0).select(0, 0).select(0, 0).item(); };
  const double pairs = 0.5 * static_cast<double>(tokens) * static_cast<double>(tokens + 1);
  hdp.barrier().wait();
  const double forward =
      median_seconds([&] { out = local.forward(q, k, k, batch, attention); }, settle);
  const double backward =
      median_seconds([&] { (void)local.backward(q, q, k, k, out, batch, attention); }, settle);
  double expand = 0.0;
  if (shape.latent_dim > 0) {
    const at::Tensor latents = at::ones({tokens, shape.latent_dim}, options);
    const at::Tensor weight =
        at::ones({2 * shape.key_value_heads * shape.head_dim, shape.latent_dim}, options);
    expand = median_seconds([&] { (void)model::ops::matmul_nt(latents, weight); }, settle) /
             static_cast<double>(tokens);
  }
  const at::Tensor copied = at::empty_like(q);
  const double copy = median_seconds([&] { copied.copy_(q); }, settle);

  plan::LinkFigures inside{.bandwidth = 1e12, .latency = 0.0};
  if (hdp.size() > 1) inside = link(hdp, 1, what.device);
  plan::LinkFigures between = inside;
  if (what.ranks_per_node > 0 && hdp.size() > what.ranks_per_node) {
    between = link(hdp, what.ranks_per_node, what.device);
  }
  // The slowest rank's of each; of rates their inverse.
  std::array<double, 8> figures{forward / pairs,
                                backward / pairs,
                                copy / static_cast<double>(q.nbytes()),
                                1.0 / inside.bandwidth,
                                inside.latency,
                                1.0 / between.bandwidth,
                                between.latency,
                                expand};
  at::Tensor slowest = at::empty({std::ssize(figures)}, at::TensorOptions().dtype(at::kDouble));
  std::copy(figures.begin(), figures.end(), slowest.mutable_data_ptr<double>());
  at::Tensor shared = slowest.to(what.device);
  hdp.all_reduce_(shared, comm::ReduceOp::kMax, {.timeout = std::nullopt, .purpose = "measure"})
      .wait();
  slowest = shared.to(at::kCPU);
  std::copy_n(slowest.const_data_ptr<double>(), figures.size(), figures.begin());
  result.forward_pair_seconds = figures[0];
  result.backward_pair_seconds = figures[1];
  result.expand_seconds = figures[7];
  result.copy_bandwidth = 1.0 / figures[2];
  result.inside = {.bandwidth = 1.0 / figures[3], .latency = figures[4]};
  result.between = {.bandwidth = 1.0 / figures[5], .latency = figures[6]};
  return result;
}

}  // namespace meshloom::parallel
