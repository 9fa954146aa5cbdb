#include "meshloom/train/adamw.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <regex>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/core/error.h"

namespace meshloom::train {

namespace {

/// Elements of one partial norm: bounds the temporary that the cast to fp64 needs.
constexpr std::int64_t kNormPiece = 1 << 18;

}  // namespace

std::vector<ParameterSetting> parameter_settings(const model::ParameterTable& table,
                                                 const AdamWOptions& options,
                                                 const std::vector<ParameterRule>& rules) {
  std::vector<std::regex> patterns;
  for (const ParameterRule& rule : rules) patterns.emplace_back(rule.pattern);
  std::vector<std::int64_t> matches(rules.size(), 0);
  std::vector<ParameterSetting> settings;
  for (const model::ParameterSpec& spec : table.parameters) {
    ParameterSetting setting{.name = spec.name,
                             .weight_decay = spec.decay ? options.weight_decay : 0.0};
    bool settled = false;
    for (std::size_t i = 0; i < rules.size(); ++i) {
      if (!std::regex_search(spec.name, patterns[i])) continue;
      ++matches[i];
      if (settled) continue;
      settled = true;
      setting.lr_factor = rules[i].lr_factor;
      setting.weight_decay = rules[i].weight_decay.value_or(setting.weight_decay);
      setting.frozen = rules[i].frozen;
    }
    settings.push_back(std::move(setting));
  }
  for (std::size_t i = 0; i < rules.size(); ++i) {
    if (matches[i] == 0) {
      throw InvalidArgument(
          "train.parameter_settings",
          fmt::format("rules[{}]: the pattern \"{}\" matches none of {} parameters ({}, ...)", i,
                      rules[i].pattern, table.parameters.size(),
                      table.parameters.empty() ? "none" : table.parameters.front().name));
    }
  }
  return settings;
}

AdamW::AdamW(const model::ParameterTable& table, parallel::FlatRange range, at::Tensor master,
             const AdamWOptions& options, const std::vector<ParameterRule>& rules)
    : AdamW(table, parameter_settings(table, options, rules), range, std::move(master), options) {}

AdamW::AdamW(const model::ParameterTable& table, const std::vector<ParameterSetting>& settings,
             parallel::FlatRange range, at::Tensor master, const AdamWOptions& options)
    : options_(options), range_(range), master_(std::move(master)) {
  MESHLOOM_CHECK_EQ(master_.numel(), range.size(), "train.AdamW", "elements of master");
  exp_avg_ = at::zeros_like(master_);
  exp_avg_sq_ = at::zeros_like(master_);
  settle(table, settings);
}

void AdamW::settle(const model::ParameterTable& table,
                   const std::vector<ParameterSetting>& settings) {
  groups_.clear();
  std::unordered_map<std::string_view, const ParameterSetting*> by_name;
  for (const ParameterSetting& setting : settings) by_name.emplace(setting.name, &setting);
  for (const model::ParameterSpec& spec : table.parameters) {
    const auto found = by_name.find(spec.name);
    MESHLOOM_CHECK(found != by_name.end(), "train.AdamW",
                   fmt::format("\"{}\" has no setting", spec.name));
    const ParameterSetting& setting = *found->second;
    const Segment segment{std::max(spec.offset, range_.begin) - range_.begin,
                          std::min(spec.offset + spec.elements(), range_.end) - range_.begin};
    if (setting.frozen || spec.counts_choices || segment.end <= segment.begin) continue;
    auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& candidate) {
      return candidate.lr_factor == setting.lr_factor &&
             candidate.weight_decay == setting.weight_decay;
    });
    if (group == groups_.end()) {
      group = groups_.insert(groups_.end(), Group{setting.lr_factor, setting.weight_decay, {}});
    }
    if (!group->segments.empty() && group->segments.back().end == segment.begin) {
      group->segments.back().end = segment.end;
    } else {
      group->segments.push_back(segment);
    }
  }
}

double AdamW::squared_norm(const at::Tensor& gradient) const {
  MESHLOOM_CHECK_EQ(gradient.numel(), master_.numel(), "train.AdamW", "elements of gradient");
  at::Tensor total = at::zeros({}, master_.options().dtype(at::kDouble));
  for (const Group& group : groups_) {
    for (const Segment& segment : group.segments) {
      for (std::int64_t at = segment.begin; at < segment.end; at += kNormPiece) {
        const at::Tensor piece = gradient.narrow(0, at, std::min(kNormPiece, segment.end - at));
        const at::Tensor norm = at::linalg_vector_norm(piece, 2, std::nullopt, false, at::kDouble);
        total.addcmul_(norm, norm);
      }
    }
  }
  return total.item<double>();
}

void move_correction_biases_(at::Tensor& master, const at::Tensor& counts,
                             const model::ParameterTable& table, parallel::FlatRange range,
                             const std::vector<ParameterSetting>& settings, double mean,
                             double speed) {
  MESHLOOM_CHECK_EQ(master.numel(), range.size(), "train.move_correction_biases", "elements");
  MESHLOOM_CHECK_EQ(counts.numel(), range.size(), "train.move_correction_biases", "counts");
  for (const model::ParameterSpec& spec : table.parameters) {
    if (!spec.counts_choices) continue;
    const std::int64_t begin = std::max(spec.offset, range.begin) - range.begin;
    const std::int64_t end = std::min(spec.offset + spec.elements(), range.end) - range.begin;
    if (end <= begin) continue;
    const auto setting = std::find_if(settings.begin(), settings.end(),
                                      [&](const auto& s) { return s.name == spec.name; });
    if (setting != settings.end() && setting->frozen) continue;
    at::Tensor part = master.narrow(0, begin, end - begin);
    part.add_((mean - counts.narrow(0, begin, end - begin)).sign(), speed);
  }
}

void AdamW::step(at::Tensor& gradient, double factor, double scale) {
  MESHLOOM_CHECK_EQ(gradient.numel(), master_.numel(), "train.AdamW", "elements of gradient");
  if (scale != 1.0) gradient.mul_(scale);
  ++updates_;
  const at::Tensor count =
      at::full({}, static_cast<double>(updates_), master_.options().dtype(at::kFloat));
  for (const Group& group : groups_) {
    std::vector<at::Tensor> values;
    std::vector<at::Tensor> gradients;
    std::vector<at::Tensor> averages;
    std::vector<at::Tensor> squares;
    for (const Segment& segment : group.segments) {
      const std::int64_t size = segment.end - segment.begin;
      values.push_back(master_.narrow(0, segment.begin, size));
      gradients.push_back(gradient.narrow(0, segment.begin, size));
      averages.push_back(exp_avg_.narrow(0, segment.begin, size));
      squares.push_back(exp_avg_sq_.narrow(0, segment.begin, size));
    }
    const std::vector<at::Tensor> counts(values.size(), count);
    at::_fused_adamw_(values, gradients, averages, squares, {}, counts,
                      options_.lr * factor * group.lr_factor, options_.beta1, options_.beta2,
                      group.weight_decay, options_.eps, /*amsgrad=*/false, /*maximize=*/false);
  }
}

}  // namespace meshloom::train
