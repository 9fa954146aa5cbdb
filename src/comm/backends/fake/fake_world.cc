#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <mutex>

#include "comm/internal/group.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace detail {
namespace {

class FakeGroup final : public GroupImpl {
 public:
  /// @param world_ranks  the world rank of every member, which the split rule is asked about.
  FakeGroup(GroupInfo info, std::vector<int> world_ranks, SplitRule rule)
      : GroupImpl(std::move(info)), world_ranks_(std::move(world_ranks)), rule_(std::move(rule)) {}

  [[nodiscard]] std::string backend() const override { return "fake"; }

  void start(const std::shared_ptr<WorkImpl>& work) override {
    const std::string reason = aborted();
    if (!reason.empty()) {
      work->fail("aborted: " + reason);
      return;
    }
    const Request& request = work->request();
    if (request.output.defined() && !request.output.is_same(request.input)) {
      request.output.zero_();
    }
    work->complete();
  }

  void abort(const std::string& reason) noexcept override {
    std::vector<std::shared_ptr<GroupImpl>> children;
    {
      const std::lock_guard lock(mutex_);
      if (!reason_.empty()) return;
      reason_ = reason.empty() ? "no reason given" : reason;
      for (const auto& child : children_) {
        if (auto group = child.lock()) children.push_back(std::move(group));
      }
    }
    for (const auto& child : children) child->abort(reason);
  }

  [[nodiscard]] std::string abort_reason() override { return aborted(); }

  [[nodiscard]] std::vector<int> missing(const WorkImpl&) override { return {}; }

  [[nodiscard]] std::vector<SplitVote> gather_votes(int color, int key,
                                                    const std::string& name) override {
    std::vector<SplitVote> result;
    for (int r = 0; r < info().size; ++r) {
      if (r == info().rank) {
        result.push_back({color, key, 0});
      } else if (rule_) {
        const auto [other_color, other_key] = rule_(world_ranks_[r], name);
        result.push_back({other_color, other_key, 0});
      } else {
        throw NotSupported(
            "comm.split", fmt::format("rank {}/{} group \"{}\": a fake world can't ask other ranks "
                                      "for their colours, expected a SplitRule",
                                      info().rank, info().size, info().name));
      }
    }
    return result;
  }

  [[nodiscard]] std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& place) override {
    if (!place) return nullptr;
    std::vector<int> ranks;
    for (const int member : place->members) ranks.push_back(world_ranks_[member]);
    const int size = static_cast<int>(ranks.size());
    auto child = std::make_shared<FakeGroup>(child_info(info(), place->name, place->rank, size),
                                             std::move(ranks), rule_);
    const std::lock_guard lock(mutex_);
    children_.push_back(child);
    return child;
  }

 private:
  [[nodiscard]] std::string aborted() {
    const std::lock_guard lock(mutex_);
    return reason_;
  }

  std::mutex mutex_;
  std::string reason_;
  std::vector<int> world_ranks_;
  SplitRule rule_;
  std::vector<std::weak_ptr<GroupImpl>> children_;
};

}  // namespace
}  // namespace detail

Communicator make_fake_world(int rank, int size, const GroupOptions& options, SplitRule rule) {
  std::vector<int> ranks;
  for (int r = 0; r < size; ++r) ranks.push_back(r);
  auto info = detail::make_info(options, rank, size);
  info.deterministic = true;
  return Communicator(
      std::make_shared<detail::FakeGroup>(std::move(info), std::move(ranks), std::move(rule)));
}

}  // namespace meshloom::comm
