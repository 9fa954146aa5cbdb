#include "meshloom/parallel/sharded_space.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::parallel {
namespace {

at::ScalarType master_type(at::ScalarType compute) {
  return compute == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

ShardedSpace::ShardedSpace(model::ParameterTable table, Replicas replicas, Zero zero,
                           at::ScalarType compute, at::Device device)
    : table_(std::move(table)),
      replicas_(std::move(replicas)),
      zero_(alone() ? Zero::kOptimizer : zero),
      value_options_(at::TensorOptions().dtype(compute).device(device)),
      master_options_(at::TensorOptions().dtype(master_type(compute)).device(device)) {
  if (!shards_values()) values_ = at::zeros({table_.elements}, value_options_);
  if (zero_ == Zero::kOptimizer) gradients_ = at::zeros({table_.elements}, master_options_);
  assign(shards_values() ? at::zeros({table_.elements}, value_options_) : values_);
}

FlatRange ShardedSpace::own_range() const {
  return owned_range(table_.elements, replicas_.position(), replicas_.size());
}

at::Tensor ShardedSpace::shard_values() const { return master_.to(value_options_); }

const at::Tensor& ShardedSpace::values() {
  if (!values_.defined()) {
    fetch();
    values_ = gathering_->result();
    gathering_.reset();
  }
  return values_;
}

void ShardedSpace::fetch() {
  if (!shards_values() || values_.defined() || gathering_) return;
  gathering_ = replicas_.all_gather(shard_values(), table_.elements);
}

void ShardedSpace::drop() {
  if (!shards_values()) return;
  if (gathering_) static_cast<void>(gathering_->result());
  gathering_.reset();
  values_.reset();
}

const at::Tensor& ShardedSpace::gradients() {
  if (!gradients_.defined()) gradients_ = at::zeros({table_.elements}, master_options_);
  return gradients_;
}

void ShardedSpace::zero_gradients() {
  MESHLOOM_CHECK(!reducing_, "parallel.sharded_space", "gradients are being summed");
  shard_gradient_.reset();
  if (zero_ == Zero::kOptimizer) {
    gradients_.zero_();
  } else {
    gradients_.reset();
  }
}

void ShardedSpace::start_reduce() {
  if (alone()) return;
  reducing_ = replicas_.reduce_scatter(gradients());
}

void ShardedSpace::finish_reduce() {
  if (alone()) {  // the whole buffer is the shard: no second one
    shard_gradient_ = gradients_;
    return;
  }
  MESHLOOM_CHECK(reducing_.has_value(), "parallel.sharded_space", "no sum is under way");
  at::Tensor sum = reducing_->result();
  reducing_.reset();
  if (zero_ == Zero::kOptimizer || !shard_gradient_.defined()) {
    shard_gradient_ = std::move(sum);
  } else {
    shard_gradient_.add_(sum);
  }
  if (zero_ != Zero::kOptimizer) gradients_.reset();
}

void ShardedSpace::start_gather() {
  if (shards_values()) return;
  const FlatRange own = own_range();
  at::Tensor shard = values_.narrow(0, own.begin, own.size());
  if (!shard.is_alias_of(master_)) shard.copy_(master_);
  if (!alone()) gathering_ = replicas_.all_gather(shard, table_.elements);
}

void ShardedSpace::finish_gather() {
  if (shards_values() || alone()) return;
  values_.copy_(gathering_->result());
  gathering_.reset();
}

std::vector<ShardedSpace::Kept> ShardedSpace::kept() const {
  std::vector<Kept> result;
  if (!shards_values()) result.push_back({.tensor = values_, .whole = true});
  if (shards_values() || !master_.is_alias_of(values_)) result.push_back({.tensor = master_});
  return result;
}

void ShardedSpace::rename(model::ParameterTable table) {
  const auto same = [](const model::ParameterSpec& a, const model::ParameterSpec& b) {
    return a.offset == b.offset && a.shape == b.shape;
  };
  MESHLOOM_CHECK(std::equal(table.parameters.begin(), table.parameters.end(),
                            table_.parameters.begin(), table_.parameters.end(), same),
                 "parallel.sharded_space.rename", "the parameters have other shapes");
  table_ = std::move(table);
}

void ShardedSpace::assign(const at::Tensor& full) {
  MESHLOOM_CHECK_EQ(full.numel(), table_.elements, "parallel.sharded_space.assign", "elements");
  const FlatRange own = own_range();
  if (values_.defined() && !full.is_same(values_)) values_.copy_(full);
  if (!shards_values() && value_options_.dtype() == master_options_.dtype()) {
    master_ = values_.narrow(0, own.begin, own.size());
  } else {
    master_ = full.narrow(0, own.begin, own.size()).to(master_options_, false, /*copy=*/true);
  }
}

}  // namespace meshloom::parallel
