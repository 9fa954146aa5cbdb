#include "meshloom/parallel/zero1.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::parallel {
namespace {

constexpr comm::CallOptions kGradientCall{.timeout = std::nullopt, .purpose = "gradients"};
constexpr comm::CallOptions kParameterCall{.timeout = std::nullopt, .purpose = "parameters"};

at::ScalarType master_type(at::ScalarType compute) {
  return compute == at::kDouble ? at::kDouble : at::kFloat;
}

std::vector<std::int64_t> even_rows(std::int64_t elements, int ranks) {
  std::vector<std::int64_t> rows;
  for (std::int64_t r = 0; r < ranks; ++r) {
    rows.push_back(elements * (r + 1) / ranks - elements * r / ranks);
  }
  return rows;
}

}  // namespace

Zero1::Zero1(const model::ParameterTable& table, comm::Communicator group, at::ScalarType compute,
             at::Device device)
    : group_(std::move(group)),
      elements_(table.elements),
      rows_(even_rows(table.elements, group_.size())),
      parameters_(at::zeros({table.elements}, at::TensorOptions().dtype(compute).device(device)),
                  at::zeros({table.elements},
                            at::TensorOptions().dtype(master_type(compute)).device(device))) {
  assign(parameters_.values());
}

FlatRange Zero1::range(int rank) const {
  const std::int64_t size = group_.size();
  MESHLOOM_CHECK(rank >= 0 && rank < size, "parallel.zero1", "rank outside the group");
  return {.begin = elements_ * rank / size, .end = elements_ * (rank + 1) / size};
}

void Zero1::zero_gradients() { parameters_.gradients().zero_(); }

void Zero1::reduce() {
  if (group_.size() == 1) {  // the whole buffer is the shard: no second one
    shard_gradient_ = parameters_.gradients();
    return;
  }
  shard_gradient_ = group_.reduce_scatter(parameters_.gradients(), rows_, kGradientCall).result();
}

void Zero1::reduce_to_all() {
  auto gradients = parameters_.gradients();
  group_.all_reduce_(gradients, comm::ReduceOp::kSum, kGradientCall).wait();
  const auto own = own_range();
  shard_gradient_ = gradients.narrow(0, own.begin, own.size());
}

void Zero1::gather() {
  const auto own = own_range();
  auto shard = parameters_.values().narrow(0, own.begin, own.size());
  if (master_.scalar_type() != shard.scalar_type()) shard.copy_(master_);
  // Everyone's range in place: an all-gather would bring them in a second buffer of the model's
  // size.
  std::vector<at::Tensor> shards;
  std::vector<comm::Work> pending;
  for (int rank = 0; rank < group_.size(); ++rank) {
    const auto [begin, end] = range(rank);
    shards.push_back(parameters_.values().narrow(0, begin, end - begin));
    if (end > begin) pending.push_back(group_.broadcast_(shards.back(), rank, kParameterCall));
  }
  for (auto& work : pending) work.wait();
}

void Zero1::assign(const at::Tensor& full) {
  MESHLOOM_CHECK_EQ(full.numel(), elements_, "parallel.zero1.assign", "elements");
  const auto own = own_range();
  auto values = parameters_.values();
  if (!full.is_same(values)) values.copy_(full);
  const auto type = master_type(values.scalar_type());
  const auto shard = values.narrow(0, own.begin, own.size());
  master_ = type == values.scalar_type()
                ? shard
                : full.narrow(0, own.begin, own.size()).to(values.device(), type, false, true);
}

}  // namespace meshloom::parallel
