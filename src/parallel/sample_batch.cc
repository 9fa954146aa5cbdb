#include "meshloom/parallel/sample_batch.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>

#include "meshloom/core/check.h"
#include "meshloom/plan/slicing.h"

namespace meshloom::parallel {
namespace {

std::int64_t count_targets(const SampleTokens& document) {
  if (document.tokens.empty()) return 0;
  if (document.loss_mask.empty()) return static_cast<std::int64_t>(document.tokens.size()) - 1;
  std::int64_t count = 0;
  for (std::size_t t = 1; t < document.loss_mask.size(); ++t) count += document.loss_mask[t] != 0;
  return count;
}

void check_document(const plan::SampleInfo& info, const SampleTokens& document,
                    std::int64_t vocabulary) {
  const auto tokens = static_cast<std::int64_t>(document.tokens.size());
  if (tokens != info.tokens) {
    throw DataError("parallel.build_batch", fmt::format("sample {} has {} tokens, the plan says {}",
                                                        info.id, tokens, info.tokens));
  }
  if (!document.loss_mask.empty() && document.loss_mask.size() != document.tokens.size()) {
    throw DataError("parallel.build_batch",
                    fmt::format("sample {} has {} tokens and a loss mask of {}", info.id, tokens,
                                document.loss_mask.size()));
  }
  const auto targets = count_targets(document);
  if (targets != info.loss_tokens) {
    throw DataError("parallel.build_batch",
                    fmt::format("sample {} has {} loss tokens, the plan says {}", info.id, targets,
                                info.loss_tokens));
  }
  if (vocabulary == 0) return;
  const auto bad = std::find_if(document.tokens.begin(), document.tokens.end(),
                                [&](auto token) { return token < 0 || token >= vocabulary; });
  if (bad != document.tokens.end()) {
    throw DataError(
        "parallel.build_batch",
        fmt::format("sample {}: token {} at position {} is outside the vocabulary of {}", info.id,
                    *bad, bad - document.tokens.begin(), vocabulary));
  }
}

using SampleIndex = std::unordered_map<std::int64_t, const plan::SampleInfo*>;

SampleIndex index_samples(const plan::StepPlan& plan) {
  SampleIndex by_id;
  for (const auto& sample : plan.samples) by_id.emplace(sample.id, &sample);
  return by_id;
}

/// What a member of a unit holds of its samples.
std::vector<model::DocumentSlice> member_documents(const SampleIndex& by_id, const plan::Unit& unit,
                                                   int index) {
  const int degree = static_cast<int>(unit.ranks.size());
  std::vector<model::DocumentSlice> documents;
  for (const auto id : unit.samples) {
    const auto& info = *by_id.at(id);
    documents.push_back({.sample = id,
                         .length = info.tokens,
                         .ranges = plan::member_ranges(info.tokens, degree, index)});
  }
  return documents;
}

std::int64_t count_tokens(const std::vector<model::DocumentSlice>& documents) {
  std::int64_t rows = 0;
  for (const auto& document : documents) rows += document.tokens();
  return rows;
}

}  // namespace

model::SequenceBatch build_batch(const plan::StepPlan& plan, const plan::Unit& unit, int index,
                                 const SampleLoader& load, c10::Device device,
                                 std::int64_t vocabulary) {
  const auto by_id = index_samples(plan);
  model::SequenceBatch batch;
  batch.documents = member_documents(by_id, unit, index);
  const std::int64_t rows = count_tokens(batch.documents);
  const auto host = at::TensorOptions().dtype(at::kLong);
  batch.positions = at::empty({rows}, host);
  if (!load) {
    auto* position = batch.positions.mutable_data_ptr<std::int64_t>();
    for (const auto& slice : batch.documents) {
      for (const auto& range : slice.ranges) {
        for (auto t = range.begin; t < range.end; ++t) *position++ = t;
      }
    }
    batch.positions = batch.positions.to(device);
    return batch;
  }
  batch.tokens = at::empty({rows}, host);
  batch.labels = at::empty({rows}, host);
  auto* tokens = batch.tokens.mutable_data_ptr<std::int64_t>();
  auto* positions = batch.positions.mutable_data_ptr<std::int64_t>();
  auto* labels = batch.labels.mutable_data_ptr<std::int64_t>();
  std::int64_t row = 0;
  for (const auto& slice : batch.documents) {
    const auto document = load(slice.sample);
    check_document(*by_id.at(slice.sample), document, vocabulary);
    for (const auto& range : slice.ranges) {
      for (auto t = range.begin; t < range.end; ++t, ++row) {
        const auto at = static_cast<std::size_t>(t);
        tokens[row] = document.tokens[at];
        positions[row] = t;
        const bool target =
            t + 1 < slice.length && (document.loss_mask.empty() || document.loss_mask[at + 1] != 0);
        labels[row] = target ? document.tokens[at + 1] : model::kIgnoreLabel;
      }
    }
  }
  if (!device.is_cpu()) {
    batch.tokens = batch.tokens.to(device);
    batch.positions = batch.positions.to(device);
    batch.labels = batch.labels.to(device);
  }
  return batch;
}

std::int64_t member_tokens(const plan::StepPlan& plan, const plan::Unit& unit, int index) {
  return count_tokens(member_documents(index_samples(plan), unit, index));
}

model::SequenceBatch empty_batch(c10::Device device) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  return {.tokens = at::empty({0}, options),
          .positions = at::empty({0}, options),
          .labels = at::empty({0}, options),
          .documents = {}};
}

}  // namespace meshloom::parallel
