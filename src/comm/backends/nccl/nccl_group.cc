#include <fmt/format.h>

#include <atomic>

#include "comm/backends/nccl/nccl_engine.h"
#include "comm/internal/child_group.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::detail {
namespace {

// Ends the engine with the last group of its world.
class NcclLease {
 public:
  explicit NcclLease(std::shared_ptr<NcclEngine> shared) : engine(std::move(shared)) {
    engine->open();
  }
  ~NcclLease() { engine->close(); }
  NcclLease(const NcclLease&) = delete;
  NcclLease& operator=(const NcclLease&) = delete;

  const std::shared_ptr<NcclEngine> engine;
};

class NcclGroup final : public GroupImpl {
 public:
  using State = NcclEngine::Group;

  NcclGroup(GroupInfo info, std::shared_ptr<NcclLease> lease, std::shared_ptr<State> state)
      : GroupImpl(std::move(info)), lease_(std::move(lease)), state_(std::move(state)) {}

  ~NcclGroup() override { lease_->engine->retire(state_->lane); }

  [[nodiscard]] std::string backend() const override { return "nccl"; }
  [[nodiscard]] at::Device device() const override { return engine().device().device(); }
  void start(const std::shared_ptr<WorkImpl>& work) override { engine().start(state_, work); }
  void abort(const std::string& reason) noexcept override { engine().abort(state_, reason, true); }
  [[nodiscard]] std::string abort_reason() override {
    const std::lock_guard lock(state_->mutex);
    return state_->aborted ? state_->reason : "";
  }
  // NCCL does not know who has come.
  [[nodiscard]] std::vector<int> missing(const WorkImpl&) override { return {}; }

  [[nodiscard]] std::vector<SplitVote> gather_votes(int color, int key,
                                                    const std::string& name) override {
    auto votes = GroupImpl::gather_votes(color, key, name);
    // The rank with the most communicators decides for all, so that none waits for one that stops.
    std::int32_t most = 0;
    for (const SplitVote& vote : votes) most = std::max(most, vote.token);
    if (most >= engine().options().max_communicators) {
      throw NotSupported("comm.split",
                         fmt::format("rank {}/{} group \"{}\": \"{}\" would be communicator {} of "
                                     "a process, expected at most {} "
                                     "(NcclOptions::max_communicators); this one has {}",
                                     info().rank, info().size, info().name, name, most + 1,
                                     engine().options().max_communicators, engine().lane_names()));
    }
    return votes;
  }
  [[nodiscard]] std::int32_t split_token() override { return engine().lanes(); }

  [[nodiscard]] std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& place) override {
    const std::string who =
        fmt::format("rank {}/{} group \"{}\"", info().rank, info().size, info().name);
    const std::string name = place ? place->name : "";
    auto host = state_->host->split(place ? place->color : -1, place ? place->rank : 0, "split");
    auto lane = engine().split_lane(state_->lane, place ? place->color : -1,
                                    place ? place->rank : 0, name, info().timeout, who);
    if (!place) return nullptr;
    std::vector<int> members = world_ranks(state_->members, place->members);
    const int size = static_cast<int>(members.size());
    auto child = make(lease_, child_info(info(), name, place->rank, size), std::move(members),
                      std::move(lane), std::move(host));
    attach_child(*state_, *child, child->state_);
    return child;
  }

  static std::shared_ptr<NcclGroup> make(const std::shared_ptr<NcclLease>& lease, GroupInfo info,
                                         std::vector<int> members, std::shared_ptr<NcclLane> lane,
                                         std::optional<Communicator> host) {
    auto state = std::make_shared<State>();
    state->rank = info.rank;
    state->members = std::move(members);
    state->lane = std::move(lane);
    state->host = std::move(host);
    auto group = std::make_shared<NcclGroup>(std::move(info), lease, state);
    state->owner = group;
    lease->engine->add_group(state);
    return group;
  }

 private:
  [[nodiscard]] NcclEngine& engine() const { return *lease_->engine; }

  std::shared_ptr<NcclLease> lease_;
  std::shared_ptr<State> state_;
};

}  // namespace

Communicator make_nccl_world(const std::shared_ptr<NcclApi>& api,
                             const std::shared_ptr<DeviceApi>& device, Communicator bootstrap,
                             const GroupOptions& options, const NcclOptions& nccl) {
  auto info = make_info(options, bootstrap.rank(), bootstrap.size());
  const std::string who = fmt::format("rank {}/{} group \"{}\"", info.rank, info.size, info.name);
  if (options.deterministic) {
    throw NotSupported(
        "comm.make_nccl_world",
        who + ": NCCL does not reduce in rank order, expected deterministic = false");
  }
  constexpr int kOldest = 21800;  // ncclCommSplit, non-blocking communicators
  if (api->version() < kOldest) {
    throw NotSupported(
        "comm.make_nccl_world",
        fmt::format("{}: NCCL {} was found, expected 2.18 or newer", who, api->version()));
  }
  auto host = bootstrap.split(0, info.rank, "nccl " + info.name);
  const auto lease = std::make_shared<NcclLease>(std::make_shared<NcclEngine>(api, device, nccl));
  lease->engine->make_message_lane(*host, info.timeout, info.name);
  auto lane = lease->engine->split_lane(nullptr, 0, info.rank, info.name, info.timeout, who);
  std::vector<int> members;
  for (int r = 0; r < info.size; ++r) members.push_back(r);
  return Communicator(NcclGroup::make(lease, std::move(info), std::move(members), std::move(lane),
                                      std::move(host)));
}

}  // namespace meshloom::comm::detail
