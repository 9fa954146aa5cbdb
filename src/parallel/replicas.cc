#include "meshloom/parallel/replicas.h"

#include <deque>
#include <functional>
#include <map>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::parallel {
namespace {

constexpr comm::CallOptions kSumCall{.timeout = std::nullopt, .purpose = "gradients"};
constexpr comm::CallOptions kGatherCall{.timeout = std::nullopt, .purpose = "parameters"};

}  // namespace

FlatRange owned_range(std::int64_t elements, int position, int count) {
  MESHLOOM_CHECK(0 <= position && position < count, "parallel.replicas", "position in the group");
  return {.begin = elements * position / count, .end = elements * (position + 1) / count};
}

ReplicaOrder order_replicas(std::vector<int> ranks, int ranks_per_node) {
  if (ranks_per_node <= 0) return {.ranks = std::move(ranks)};
  std::map<int, std::vector<int>> by_node;
  for (const int rank : ranks) by_node[rank / ranks_per_node].push_back(rank);
  const std::size_t places = by_node.empty() ? 0 : by_node.begin()->second.size();
  for (const auto& [node, members] : by_node) {
    if (members.size() != places) return {.ranks = std::move(ranks)};
  }
  if (by_node.size() < 2 || places < 2) return {.ranks = std::move(ranks)};
  ReplicaOrder order{.nodes = static_cast<int>(by_node.size())};
  for (std::size_t place = 0; place < places; ++place) {
    for (const auto& [node, members] : by_node) order.ranks.push_back(members[place]);
  }
  return order;
}

namespace detail {

struct ReplicaCall {
  comm::Work work;
  std::function<comm::Work(const at::Tensor& first)> next;  ///< empty: none, or started
};

/// Operations of one kind, whose second calls start in the order of the first ones.
class ReplicaLane {
 public:
  std::shared_ptr<ReplicaCall> add(ReplicaCall call) {
    auto shared = std::make_shared<ReplicaCall>(std::move(call));
    if (shared->next) waiting_.push_back(shared);
    return shared;
  }
  void advance() {
    while (!waiting_.empty() && waiting_.front()->work.done()) start_next();
  }
  at::Tensor result(ReplicaCall& call) {
    while (call.next) start_next();
    return call.work.result();
  }

 private:
  void start_next() {
    const std::shared_ptr<ReplicaCall> call = waiting_.front();
    waiting_.pop_front();
    call->work = std::exchange(call->next, nullptr)(call->work.result());
  }

  std::deque<std::shared_ptr<ReplicaCall>> waiting_;
};

}  // namespace detail

ReplicaWork::ReplicaWork(std::shared_ptr<detail::ReplicaLane> lane,
                         std::shared_ptr<detail::ReplicaCall> call)
    : lane_(std::move(lane)), call_(std::move(call)) {}

at::Tensor ReplicaWork::result() { return lane_->result(*call_); }

Replicas::Replicas(comm::Communicator group)
    : inside_sums_(group),
      inside_gatherings_(std::move(group)),
      sums_(std::make_shared<detail::ReplicaLane>()),
      gatherings_(std::make_shared<detail::ReplicaLane>()) {}

Replicas::Replicas(ReplicaLevels sums, ReplicaLevels gatherings)
    : inside_sums_(std::move(sums.inside)),
      inside_gatherings_(std::move(gatherings.inside)),
      across_sums_(std::move(sums.across)),
      across_gatherings_(std::move(gatherings.across)),
      sums_(std::make_shared<detail::ReplicaLane>()),
      gatherings_(std::make_shared<detail::ReplicaLane>()) {}

int Replicas::size() const { return inside_sums_.size() * nodes(); }

int Replicas::position() const {
  return inside_sums_.rank() * nodes() + (across_sums_ ? across_sums_->rank() : 0);
}

std::vector<std::int64_t> Replicas::inside_rows(std::int64_t elements) const {
  std::vector<std::int64_t> rows;
  for (int place = 0; place < inside_sums_.size(); ++place) {
    rows.push_back(owned_range(elements, place, inside_sums_.size()).size());
  }
  return rows;
}

std::vector<std::int64_t> Replicas::across_rows(std::int64_t elements) const {
  std::vector<std::int64_t> rows;
  for (int node = 0; node < nodes(); ++node) {
    rows.push_back(owned_range(elements, inside_sums_.rank() * nodes() + node, size()).size());
  }
  return rows;
}

ReplicaWork Replicas::reduce_scatter(const at::Tensor& flat) {
  detail::ReplicaCall call{
      .work = inside_sums_.reduce_scatter(flat, inside_rows(flat.numel()), kSumCall)};
  if (across_sums_) {
    call.next = [across = *across_sums_,
                 rows = across_rows(flat.numel())](const at::Tensor& sums) mutable {
      return across.reduce_scatter(sums, rows, kSumCall);
    };
  }
  return {sums_, sums_->add(std::move(call))};
}

ReplicaWork Replicas::all_gather(const at::Tensor& shard, std::int64_t elements) {
  detail::ReplicaCall call;
  if (across_gatherings_) {
    call.work = across_gatherings_->all_gather(shard, across_rows(elements), kGatherCall);
    call.next = [inside = inside_gatherings_,
                 rows = inside_rows(elements)](const at::Tensor& block) mutable {
      return inside.all_gather(block, rows, kGatherCall);
    };
  } else {
    call.work = inside_gatherings_.all_gather(shard, inside_rows(elements), kGatherCall);
  }
  return {gatherings_, gatherings_->add(std::move(call))};
}

void Replicas::advance() {
  sums_->advance();
  gatherings_->advance();
}

std::vector<comm::Communicator> Replicas::groups() const {
  if (!across_sums_) return {inside_sums_};
  return {inside_sums_, *across_sums_, inside_gatherings_, *across_gatherings_};
}

}  // namespace meshloom::parallel
