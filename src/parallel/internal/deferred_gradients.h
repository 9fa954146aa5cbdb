#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "meshloom/model/parameters.h"

namespace meshloom::parallel::detail {

/// Weight gradients recorded in backward and computed later, in the same order [zero-bubble
/// schedules, Qi et al. 2023]. Keeps what they are made of alive.
class DeferredGradients final : public model::WeightGradSink {
 public:
  [[nodiscard]] bool deferred() const override { return true; }
  void linear(const model::ParameterHandle& handle, const at::Tensor& dy,
              const at::Tensor& x) override {
    calls_.emplace_back([=](WeightGradSink& sink) { sink.linear(handle, dy, x); });
  }
  void grouped_linear(const model::ParameterHandle& handle, const at::Tensor& dy,
                      const at::Tensor& x, const std::vector<std::int64_t>& rows) override {
    calls_.emplace_back([=](WeightGradSink& sink) { sink.grouped_linear(handle, dy, x, rows); });
  }
  void embedding(const model::ParameterHandle& handle, const at::Tensor& ids,
                 const at::Tensor& dy) override {
    calls_.emplace_back([=](WeightGradSink& sink) { sink.embedding(handle, ids, dy); });
  }
  void add(const model::ParameterHandle& handle, const at::Tensor& value) override {
    calls_.emplace_back([=](WeightGradSink& sink) { sink.add(handle, value); });
  }
  void layer_done(std::int64_t layer) override {
    calls_.emplace_back([=](WeightGradSink& sink) { sink.layer_done(layer); });
  }

  /// Hands everything on, letting each piece go as soon as it is done with.
  void replay(model::WeightGradSink& sink) {
    for (auto& call : std::exchange(calls_, {})) std::exchange(call, nullptr)(sink);
  }

 private:
  std::vector<std::function<void(model::WeightGradSink&)>> calls_;
};

}  // namespace meshloom::parallel::detail
