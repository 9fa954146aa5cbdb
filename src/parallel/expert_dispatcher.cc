#include "meshloom/parallel/expert_dispatcher.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <memory>
#include <numeric>
#include <utility>

#include "meshloom/core/check.h"
#include "meshloom/model/ops.h"

namespace meshloom::parallel {
namespace {

constexpr comm::CallOptions kDispatchCall{.timeout = std::nullopt, .purpose = "dispatch"};
constexpr comm::CallOptions kSizesCall{.timeout = std::nullopt, .purpose = "dispatch_sizes"};

at::Tensor host_tensor(const std::vector<std::int64_t>& values) {
  at::Tensor result =
      at::empty({static_cast<std::int64_t>(values.size())}, at::TensorOptions().dtype(at::kLong));
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<std::int64_t>());
  return result;
}

/// Row numbers that bring blocks (a, b), stored a by a, into the order b by b.
/// @param rows  of each block, [outer, inner]
at::Tensor transposed_blocks(const std::vector<std::int64_t>& rows, std::size_t outer,
                             std::size_t inner) {
  std::vector<std::int64_t> begin(rows.size(), 0);
  std::exclusive_scan(rows.begin(), rows.end(), begin.begin(), std::int64_t{0});
  std::vector<std::int64_t> order;
  order.reserve(static_cast<std::size_t>(std::accumulate(rows.begin(), rows.end(), 0L)));
  for (std::size_t b = 0; b < inner; ++b) {
    for (std::size_t a = 0; a < outer; ++a) {
      const std::size_t block = a * inner + b;
      for (std::int64_t i = 0; i < rows[block]; ++i) order.push_back(begin[block] + i);
    }
  }
  return host_tensor(order);
}

}  // namespace

ExpertDispatcher::ExpertDispatcher(comm::Communicator group, const std::vector<ExpertMap>& maps,
                                   SpanSink spans)
    : group_(std::move(group)),
      maps_(maps),
      members_(static_cast<std::size_t>(group_.size())),
      spans_(std::move(spans)) {}

std::vector<std::int64_t> ExpertDispatcher::Route::receive_rows() const {
  std::vector<std::int64_t> result(send_rows.size(), 0);
  const std::size_t experts = local_experts();
  for (std::size_t i = 0; i < received.size(); ++i) result[i / experts] += received[i];
  return result;
}

at::Tensor ExpertDispatcher::pack(const Route& route) const {
  std::vector<std::int64_t> sizes = route.send_rows;
  sizes.insert(sizes.end(), route.received.begin(), route.received.end());
  return at::cat({route.source, host_tensor(sizes).to(route.source.device())});
}

ExpertDispatcher::Route ExpertDispatcher::unpack(const model::DispatchedTokens& routing,
                                                 std::int64_t pairs) const {
  const at::Tensor& notes = routing.source;
  const auto sizes = static_cast<std::int64_t>(members_ * (1 + routing.expert_rows.size()));
  MESHLOOM_CHECK_EQ(notes.numel(), pairs + sizes, "parallel.expert_dispatcher",
                    "elements of the routing's notes");
  const at::Tensor tail = notes.narrow(0, pairs, sizes).cpu();
  const std::int64_t* data = tail.const_data_ptr<std::int64_t>();
  return {.source = notes.narrow(0, 0, pairs),
          .send_rows = {data, data + members_},
          .received = {data + members_, data + sizes}};
}

at::Tensor ExpertDispatcher::finish(comm::Work work) const {
  const auto waiting = std::chrono::steady_clock::now();
  at::Tensor result = work.result();
  if (spans_) spans_(Span::Kind::kDispatch, waiting, std::chrono::steady_clock::now());
  return result;
}

/// @param rows  of the expert at each place @returns [members, local experts]
std::vector<std::int64_t> ExpertDispatcher::exchange_sizes(const std::vector<std::int64_t>& rows,
                                                           const ExpertMap& map,
                                                           const at::Tensor& like) {
  std::vector<std::int64_t> send;
  for (int member = 0; member < map.ranks(); ++member) {
    send.push_back(std::ssize(map.experts_of(member)));
  }
  const std::vector<std::int64_t> receive(members_, send[static_cast<std::size_t>(group_.rank())]);
  at::Tensor own = host_tensor(rows);
  if (group_.backend() == "nccl") own = own.to(like.device());
  const at::Tensor all = finish(group_.all_to_all(own, send, receive, kSizesCall)).cpu();
  const std::int64_t* data = all.const_data_ptr<std::int64_t>();
  return {data, data + all.numel()};
}

at::Tensor ExpertDispatcher::by_expert(const at::Tensor& rows, const Route& route) const {
  if (route.local_experts() <= 1) return rows;
  const at::Tensor order = transposed_blocks(route.received, members_, route.local_experts());
  return rows.dim() == 2 ? model::ops::gather_rows(rows, order.to(rows.device()), 1)
                         : rows.index_select(0, order.to(rows.device()));
}

at::Tensor ExpertDispatcher::by_member(const at::Tensor& rows, const Route& route) const {
  const std::size_t experts = route.local_experts();
  if (experts <= 1) return rows.contiguous();
  std::vector<std::int64_t> blocks;  // [local experts, members]
  for (std::size_t e = 0; e < experts; ++e) {
    for (std::size_t m = 0; m < members_; ++m) blocks.push_back(route.received[m * experts + e]);
  }
  const at::Tensor order = transposed_blocks(blocks, experts, members_);
  return rows.dim() == 2 ? model::ops::gather_rows(rows, order.to(rows.device()), 1)
                         : rows.index_select(0, order.to(rows.device()));
}

model::DispatchedTokens ExpertDispatcher::dispatch(const at::Tensor& x, const at::Tensor& experts,
                                                   model::ExpertLayer of) {
  return begin_dispatch(x, experts, of)();
}

model::Arrival<model::DispatchedTokens> ExpertDispatcher::begin_dispatch(const at::Tensor& x,
                                                                         const at::Tensor& experts,
                                                                         model::ExpertLayer of) {
  const ExpertMap& map = maps_.at(static_cast<std::size_t>(of.layer));
  MESHLOOM_CHECK_EQ(of.experts, map.experts(), "parallel.expert_dispatcher", "experts");
  MESHLOOM_CHECK_EQ(map.ranks(), group_.size(), "parallel.expert_dispatcher",
                    "members of the expert map");
  const at::Tensor places = host_tensor(map.places())
                                .to(experts.device())
                                .index_select(0, experts.reshape({-1}))
                                .view_as(experts);
  model::ops::ExpertOrder order = model::ops::sort_by_expert(places, of.experts);
  Route route{.source = std::move(order.source),
              .send_rows = {},
              .received = exchange_sizes(order.rows, map, x)};
  auto next = order.rows.begin();
  for (int member = 0; member < map.ranks(); ++member) {
    const auto end = next + std::ssize(map.experts_of(member));
    route.send_rows.push_back(std::accumulate(next, end, std::int64_t{0}));
    next = end;
  }
  const at::Tensor sent = model::ops::gather_rows(x, route.source, experts.size(1));
  comm::Work work = group_.all_to_all(sent, route.send_rows, route.receive_rows(), kDispatchCall);
  return [this, work = std::move(work), route = std::move(route)] {
    const at::Tensor rows = finish(work);
    std::vector<std::int64_t> expert_rows(route.local_experts(), 0);
    for (std::size_t i = 0; i < route.received.size(); ++i) {
      expert_rows[i % expert_rows.size()] += route.received[i];
    }
    return model::DispatchedTokens{.rows = by_expert(rows, route),
                                   .expert_rows = std::move(expert_rows),
                                   .source = pack(route)};
  };
}

at::Tensor ExpertDispatcher::rows_again(const at::Tensor& /*x*/,
                                        const model::DispatchedTokens& /*routing*/,
                                        std::int64_t /*experts_per_token*/) {
  throw NotSupported("parallel.expert_dispatcher",
                     "rows that came over the network are kept, not fetched again");
}

at::Tensor ExpertDispatcher::combine(const at::Tensor& y, const model::DispatchedTokens& routing,
                                     const at::Tensor& weights) {
  const Route route = unpack(routing, weights.numel());
  const at::Tensor back = finish(
      group_.all_to_all(by_member(y, route), route.receive_rows(), route.send_rows, kDispatchCall));
  return model::ops::combine_rows(back, route.source, weights);
}

model::CombineGradients ExpertDispatcher::combine_backward(const at::Tensor& dout,
                                                           const model::DispatchedTokens& routing,
                                                           const at::Tensor& weights) {
  return begin_combine_backward(dout, routing, weights)();
}

model::Arrival<model::CombineGradients> ExpertDispatcher::begin_combine_backward(
    const at::Tensor& dout, const model::DispatchedTokens& routing, const at::Tensor& weights) {
  Route route = unpack(routing, weights.numel());
  const std::vector<std::int64_t> receive = route.receive_rows();
  const at::Tensor rows = model::ops::gather_rows(dout, route.source, weights.size(1));
  const at::Tensor scales = weights.reshape({-1}).index_select(0, route.source);
  comm::Work rows_work = group_.all_to_all(rows, route.send_rows, receive, kDispatchCall);
  comm::Work scales_work = group_.all_to_all(scales, route.send_rows, receive, kDispatchCall);
  return [this, rows_work = std::move(rows_work), scales_work = std::move(scales_work),
          route = std::move(route)] {
    return model::CombineGradients{.rows = by_expert(finish(rows_work), route),
                                   .weights = by_expert(finish(scales_work), route)};
  };
}

model::DispatchGradients ExpertDispatcher::dispatch_backward(const at::Tensor& drows,
                                                             const at::Tensor& dweights,
                                                             const model::DispatchedTokens& routing,
                                                             std::int64_t tokens,
                                                             std::int64_t experts_per_token) {
  const Route route = unpack(routing, tokens * experts_per_token);
  const std::vector<std::int64_t> send = route.receive_rows();
  const at::Tensor rows = by_member(drows, route);
  const at::Tensor scales = by_member(dweights, route);
  comm::Work rows_work = group_.all_to_all(rows, send, route.send_rows, kDispatchCall);
  comm::Work scales_work = group_.all_to_all(scales, send, route.send_rows, kDispatchCall);
  const at::Tensor x = finish(std::move(rows_work));
  const at::Tensor returned = finish(std::move(scales_work));
  at::Tensor weights = at::empty({tokens * experts_per_token}, returned.options());
  weights.index_copy_(0, route.source, returned);
  return {.x = model::ops::gather_rows_backward(x, route.source, tokens, experts_per_token),
          .weights = weights.view({tokens, experts_per_token})};
}

}  // namespace meshloom::parallel
