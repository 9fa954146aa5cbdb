#include <ATen/ops/arange.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels_support.h"
#include "meshloom/core/error.h"
#include "meshloom/model/batch.h"
#include "meshloom/model/ops.h"

namespace meshloom::model {
namespace {

using testing::at_every_level;
using testing::close;
using testing::kernel_types;
using testing::leaf;
using testing::tolerance;

at::Tensor experts_for(std::int64_t tokens, std::int64_t experts, std::int64_t k) {
  return at::rand({tokens, experts}).argsort(false, 1, false).slice(1, 0, k).contiguous();
}

}  // namespace

TEST(KernelRouter, ForwardAndBackwardMatchAutograd) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 90}) {
        for (const std::int64_t experts : {1, 4, 8, 60, 128}) {
          for (const bool normalize : {false, true}) {
            for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
              const std::int64_t k = std::min<std::int64_t>(experts, 3);
              const ops::RouterOptions options{
                  .top_k = k, .normalize = normalize, .score = score, .scale = 1.7};
              const auto typed = at::TensorOptions().dtype(type);
              const at::Tensor logits = at::randn({tokens, experts}, typed);
              const at::Tensor dweights = at::randn({tokens, k}, typed);
              const at::Tensor extra = at::randn({3, experts}, typed);
              const std::vector<std::int64_t> groups = {tokens / 3, 0, tokens - tokens / 3};
              const double z_weight = score == RouterScore::kSoftmax ? 0.3 : 0.0;

              const ops::RouterOutput out = ops::route(logits, options);
              const at::Tensor x = leaf(logits);
              const at::Tensor p =
                  score == RouterScore::kSoftmax ? at::softmax(x, 1) : at::sigmoid(x);
              at::Tensor weights = p.gather(1, out.experts);
              if (normalize) weights = weights / weights.sum({1}, true);
              weights = weights * 1.7;
              const at::Tensor lse = at::logsumexp(x, {1});
              at::Tensor loss = (weights * dweights).sum() + z_weight * lse.square().sum();
              std::int64_t begin = 0;
              for (std::int64_t g = 0; g < 3; ++g) {
                const std::int64_t count = groups[static_cast<std::size_t>(g)];
                const at::Tensor rows = p.narrow(0, begin, count);
                loss = loss + (rows / rows.sum({1}, true) * extra.select(0, g)).sum();
                begin += count;
              }
              loss.backward();

              EXPECT_TRUE(close(out.probabilities, p, tolerance(type)));
              EXPECT_TRUE(close(out.weights, weights, tolerance(type)));
              EXPECT_TRUE(close(ops::normalized_probabilities(out, options), p / p.sum({1}, true),
                                tolerance(type)));
              EXPECT_TRUE(close(out.lse, lse, tolerance(type)));
              EXPECT_NEAR(out.z_sum, lse.square().sum().item<double>(), 1e-4 * (1.0 + out.z_sum));
              EXPECT_TRUE(close(out.experts, p.argsort(true, 1, true).slice(1, 0, k), 0.0));
              const at::Tensor dlogits =
                  ops::route_backward(dweights, out, options, extra, groups, z_weight, type);
              EXPECT_TRUE(close(dlogits, x.grad(), tolerance(type)));
            }
          }
        }
      }
    }
  });
}

TEST(KernelRouter, GroupsAndBiasLimitTheChoiceAlone) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
        const std::int64_t experts = 24;
        const ops::RouterOptions options{
            .top_k = 5, .score = score, .scale = 2.5, .groups = 6, .top_groups = 2};
        const auto typed = at::TensorOptions().dtype(type);
        const at::Tensor logits = at::randn({70, experts}, typed);
        const at::Tensor bias = at::randn({experts}, typed) * 0.3;
        const at::Tensor dweights = at::randn({70, 5}, typed);
        const ops::RouterOutput out = ops::route(logits, options, bias);

        const at::Tensor x = leaf(logits);
        const at::Tensor p = score == RouterScore::kSoftmax ? at::softmax(x, 1) : at::sigmoid(x);
        // Every group's two best, the best two groups, the best of these, in loops.
        const at::Tensor choice = (p + bias.to(at::kDouble)).detach();
        for (std::int64_t t = 0; t < 70; ++t) {
          std::vector<std::pair<double, std::int64_t>> groups;
          std::vector<std::pair<double, std::int64_t>> candidates;
          for (std::int64_t g = 0; g < 6; ++g) {
            const at::Tensor sorted = std::get<0>(choice[t].narrow(0, g * 4, 4).sort(0, true));
            groups.emplace_back(-(sorted[0] + sorted[1]).item<double>(), g);
          }
          std::sort(groups.begin(), groups.end());
          for (int j = 0; j < 2; ++j) {
            for (std::int64_t e = 0; e < 4; ++e) {
              const std::int64_t expert = groups[static_cast<std::size_t>(j)].second * 4 + e;
              candidates.emplace_back(-choice[t][expert].item<double>(), expert);
            }
          }
          std::sort(candidates.begin(), candidates.end());
          for (std::int64_t j = 0; j < 5; ++j) {
            EXPECT_EQ(out.experts[t][j].item<std::int64_t>(),
                      candidates[static_cast<std::size_t>(j)].second);
          }
        }
        at::Tensor weights = p.gather(1, out.experts);
        weights = weights / weights.sum({1}, true) * 2.5;
        (weights * dweights).sum().backward();
        EXPECT_TRUE(close(out.probabilities, p, tolerance(type)));
        EXPECT_TRUE(close(out.weights, weights, tolerance(type)));
        const at::Tensor dlogits = ops::route_backward(dweights, out, options, {}, {}, 0.0, type);
        EXPECT_TRUE(close(dlogits, x.grad(), tolerance(type)));
      }
    }
  });
  const at::Tensor logits = at::zeros({2, 12});
  const auto refused = [&](const ops::RouterOptions& options, const at::Tensor& bias = {}) {
    EXPECT_THROW((void)ops::route(logits, options, bias), InvalidArgument);
  };
  refused({.top_k = 2, .groups = 5});
  refused({.top_k = 1, .groups = 12});
  refused({.top_k = 4, .groups = 4});
  refused({.top_k = 2, .groups = 3, .top_groups = 4});
  refused({.top_k = 2}, at::zeros({11}));
}

TEST(KernelRouter, TiesGoToTheLowerIndex) {
  at_every_level([] {
    const at::Tensor logits = at::zeros({2, 20});
    logits.select(1, 17).fill_(1.0);
    const ops::RouterOutput out = ops::route(logits, {.top_k = 4});
    const at::Tensor expected = at::tensor({17, 0, 1, 2}, at::kLong).expand({2, 4});
    EXPECT_TRUE(out.experts.equal(expected));
  });
}

TEST(KernelPermute, MovesRowsThereAndBack) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 77}) {
        for (const std::int64_t hidden : {3, 64, 250}) {
          const std::int64_t k = 2;
          const auto options = at::TensorOptions().dtype(type);
          const at::Tensor experts = experts_for(tokens, 6, k);
          const ops::ExpertOrder order = ops::sort_by_expert(experts, 6);
          const at::Tensor stable = std::get<1>(experts.reshape({-1}).sort(true, 0, false));
          EXPECT_TRUE(order.source.equal(stable));
          const at::Tensor x = at::randn({tokens, hidden}, options);
          const at::Tensor rows = ops::gather_rows(x, order.source, k);
          const at::Tensor token = order.source.div(k, "floor");
          EXPECT_TRUE(rows.equal(x.index_select(0, token)));

          // A rank may hold only some of the pairs.
          const at::Tensor source = order.source.slice(0, order.source.numel() / 3);
          const at::Tensor part = source.div(k, "floor");
          const at::Tensor y = at::randn({source.numel(), hidden}, options);
          const at::Tensor weights = at::rand({tokens, k}, options);
          const at::Tensor weighted =
              y.to(at::kDouble) *
              weights.to(at::kDouble).view({-1}).index_select(0, source).unsqueeze(1);
          const at::Tensor out =
              at::zeros({tokens, hidden}, weighted.options()).index_add(0, part, weighted);
          EXPECT_TRUE(close(ops::combine_rows(y, source, weights), out, tolerance(type)));
          const at::Tensor back = ops::gather_rows_backward(y, source, tokens, k);
          EXPECT_TRUE(close(back, at::zeros({tokens, hidden}, options).index_add(0, part, y),
                            tolerance(type)));
        }
      }
    }
  });
  EXPECT_THROW((void)ops::sort_by_expert(at::tensor({7}, at::kLong).view({1, 1}), 6),
               InvalidArgument);
}

TEST(KernelEmbedding, GathersAndScattersInOrder) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 300}) {
        const auto options = at::TensorOptions().dtype(type);
        const at::Tensor weight = at::randn({19, 70}, options);
        const at::Tensor ids = at::randint(0, 19, {tokens}, at::kLong);
        const at::Tensor dy = at::randn({tokens, 70}, options);
        EXPECT_TRUE(ops::embedding(weight, ids).equal(weight.index_select(0, ids)));
        at::Tensor grad = weight.clone();
        ops::embedding_backward_(grad, ids, dy);
        EXPECT_TRUE(close(grad, weight.to(at::kDouble).index_add(0, ids, dy.to(at::kDouble)),
                          tolerance(type)));
      }
    }
  });
}

TEST(KernelCrossEntropy, LossAndGradientsMatchAutograd) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 230}) {
        for (const std::int64_t vocabulary : {2, 33, 9001}) {
          for (const bool masked : {false, true}) {
            const auto options = at::TensorOptions().dtype(type);
            const at::Tensor hidden = at::randn({tokens, 24}, options);
            const at::Tensor weight = at::randn({vocabulary, 24}, options) * 0.2;
            at::Tensor labels = at::randint(0, vocabulary, {tokens}, at::kLong);
            if (masked) labels.masked_fill_(at::rand({tokens}) < 0.4, kIgnoreLabel);
            const at::Tensor h = leaf(hidden);
            const at::Tensor w = leaf(weight);
            const at::Tensor loss = at::cross_entropy_loss(h.matmul(w.t()), labels, {}, 2);
            (loss * 0.25).backward();

            at::Tensor grad = at::zeros_like(weight);
            const ops::CrossEntropyOutput out = ops::linear_cross_entropy(
                hidden, weight, labels, 0.25, [&](const at::Tensor& dy, const at::Tensor& x) {
                  ops::matmul_tn_add_(grad, dy, x);
                });
            const double expected = loss.item<double>();
            const double room = tolerance(type) * (1.0 + std::abs(expected));
            EXPECT_NEAR(out.loss_sum, expected, room);
            EXPECT_EQ(out.tokens, (labels != kIgnoreLabel).sum().item<std::int64_t>());
            EXPECT_TRUE(close(out.dhidden, h.grad(), tolerance(type)));
            EXPECT_TRUE(close(grad, w.grad(), tolerance(type)));
            EXPECT_NEAR(ops::linear_cross_entropy_loss(hidden, weight, labels).loss_sum, expected,
                        room);
          }
        }
      }
    }
  });
  EXPECT_THROW((void)ops::linear_cross_entropy_loss(at::zeros({1, 2}), at::zeros({3, 2}),
                                                    at::tensor({3}, at::kLong)),
               InvalidArgument);
}

TEST(KernelCrossEntropy, SinkMayKeepItsChunks) {
  const at::Tensor hidden = at::randn({300, 8});
  const at::Tensor weight = at::randn({70000, 8});
  const at::Tensor labels = at::randint(0, 70000, {300}, at::kLong);
  std::vector<std::pair<at::Tensor, at::Tensor>> kept;
  at::Tensor now = at::zeros_like(weight);
  (void)ops::linear_cross_entropy(hidden, weight, labels, 1.0,
                                  [&](const at::Tensor& dy, const at::Tensor& x) {
                                    ops::matmul_tn_add_(now, dy, x);
                                    kept.emplace_back(dy, x);
                                  });
  EXPECT_GT(kept.size(), 1U);
  at::Tensor later = at::zeros_like(weight);
  for (const auto& [dy, x] : kept) ops::matmul_tn_add_(later, dy, x);
  EXPECT_TRUE(later.equal(now));
}

}  // namespace meshloom::model
