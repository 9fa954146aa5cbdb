// The one file that sees torch's c10d headers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <chrono>
#include <iterator>
#include <list>
#include <mutex>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "comm/backends/torch/torch_transport.h"
#include "comm/internal/child_group.h"
#include "comm/internal/group.h"
#include "meshloom/comm/torch_backend.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace detail {
namespace {

// Calls have limits of their own. One that ran out inside Gloo would end the whole process group.
constexpr std::chrono::hours kForever{24 * 365};

class ProcessGroupMessage final : public TorchMessage {
 public:
  ProcessGroupMessage(at::Tensor buffer, c10::intrusive_ptr<c10d::Work> work)
      : buffer_(std::move(buffer)), work_(std::move(work)) {}

  void wait() override {
    if (work_ && !work_->wait(kForever)) throw CommError("comm.torch", "the message was aborted");
  }

  void abort() noexcept override {
    try {
      if (work_) work_->abort();
    } catch (...) {  // not every process group can; its wait then ends with the process group
    }
  }

 private:
  at::Tensor buffer_;
  c10::intrusive_ptr<c10d::Work> work_;
};

// Worlds over one process group are numbered in the order of their making, which is the same on
// all ranks. The count belongs to the process group, which has no room for it. A process group
// whose count is kept is not freed before the count: `forget` has to follow its release, or Gloo's
// threads would live until the statics of this process are destroyed, and die with them.
class WorldNumbers {
 public:
  int next(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
    forget();
    const std::lock_guard lock(mutex_);
    for (Entry& entry : entries_) {
      if (entry.group.lock().get() == group.get()) return entry.worlds++ % TorchTransport::kWorlds;
    }
    entries_.push_back({c10::weak_intrusive_ptr<c10d::ProcessGroup>(group), 1});
    return 0;
  }

  // Frees the process groups that nobody holds any more.
  void forget() {
    std::list<Entry> gone;  // freed outside the lock
    const std::lock_guard lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      const auto next = std::next(entry);
      if (entry->group.expired()) gone.splice(gone.end(), entries_, entry);
      entry = next;
    }
  }

  // Never destroyed: at the process's end a process group may still be in use.
  static WorldNumbers& of_process() {
    static auto* const numbers = new WorldNumbers;
    return *numbers;
  }

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10d::ProcessGroup> group;
    int worlds = 0;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;
};

class ProcessGroupPort final : public TorchPort {
 public:
  explicit ProcessGroupPort(c10::intrusive_ptr<c10d::ProcessGroup> group)
      : group_(std::move(group)) {}
  ~ProcessGroupPort() override {
    group_.reset();
    WorldNumbers::of_process().forget();
  }

  std::unique_ptr<TorchMessage> send(int peer, std::byte* data, std::int64_t bytes,
                                     int tag) override {
    std::vector<at::Tensor> tensors{wrap(data, bytes)};
    const std::lock_guard lock(mutex_);
    auto work = group_->send(tensors, peer, tag);
    return std::make_unique<ProcessGroupMessage>(tensors[0], std::move(work));
  }

  std::unique_ptr<TorchMessage> receive(int peer, std::byte* data, std::int64_t bytes,
                                        int tag) override {
    std::vector<at::Tensor> tensors{wrap(data, bytes)};
    const std::lock_guard lock(mutex_);
    auto work = group_->recv(tensors, peer, tag);
    return std::make_unique<ProcessGroupMessage>(tensors[0], std::move(work));
  }

  std::unique_ptr<TorchMessage> receive_from_any(std::byte* data, std::int64_t bytes,
                                                 int tag) override {
    std::vector<at::Tensor> tensors{wrap(data, bytes)};
    const std::lock_guard lock(mutex_);
    try {
      auto work = group_->recvAnysource(tensors, tag);
      return std::make_unique<ProcessGroupMessage>(tensors[0], std::move(work));
    } catch (const c10::Error&) {  // only some process groups have it
      return nullptr;
    }
  }

 private:
  static at::Tensor wrap(std::byte* data, std::int64_t bytes) {
    return at::from_blob(data, {bytes}, at::TensorOptions().dtype(at::kByte));
  }

  std::mutex mutex_;  // c10d counts its calls without a lock
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

// Closes the transport when the last group of its world is gone.
class Lease {
 public:
  Lease(std::shared_ptr<TorchTransport> shared, int size) : transport(std::move(shared)) {
    if (size > 1) transport->open();
  }
  ~Lease() { transport->close(); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  const std::shared_ptr<TorchTransport> transport;
};

class TorchGroup final : public GroupImpl {
 public:
  using State = TorchTransport::Group;

  TorchGroup(GroupInfo info, std::shared_ptr<Lease> lease, std::shared_ptr<State> state)
      : GroupImpl(std::move(info)), lease_(std::move(lease)), state_(std::move(state)) {}

  [[nodiscard]] std::string backend() const override { return "torch"; }
  void start(const std::shared_ptr<WorkImpl>& work) override { transport().start(state_, work); }
  void abort(const std::string& reason) noexcept override {
    transport().abort(state_, reason, true);
  }
  [[nodiscard]] std::string abort_reason() override {
    const std::lock_guard lock(state_->mutex);
    return state_->reason;
  }
  [[nodiscard]] std::vector<int> missing(const WorkImpl& work) override {
    return transport().missing(work);
  }
  [[nodiscard]] std::int32_t split_token() override { return transport().propose_id(); }

  [[nodiscard]] std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& place) override {
    if (!place) return nullptr;
    transport().take_id(place->token);
    if (place->token >= TorchTransport::kGroups) {
      throw CommError("comm.split",
                      fmt::format("rank {}/{} group \"{}\": a torch world has tags for {} groups, "
                                  "all are taken",
                                  info().rank, info().size, info().name, TorchTransport::kGroups));
    }
    std::vector<int> members = world_ranks(state_->members, place->members);
    const int size = static_cast<int>(members.size());
    auto child = make(lease_, child_info(info(), place->name, place->rank, size), place->token,
                      std::move(members));
    attach_child(*state_, *child, child->state_);
    return child;
  }

  static std::shared_ptr<TorchGroup> make(const std::shared_ptr<Lease>& lease, GroupInfo info,
                                          int id, std::vector<int> members) {
    auto state = std::make_shared<State>();
    state->id = id;
    state->rank = info.rank;
    state->members = std::move(members);
    auto group = std::make_shared<TorchGroup>(std::move(info), lease, state);
    state->owner = group;
    lease->transport->add_group(state);
    return group;
  }

 private:
  [[nodiscard]] TorchTransport& transport() const { return *lease_->transport; }

  std::shared_ptr<Lease> lease_;
  std::shared_ptr<State> state_;
};

}  // namespace
}  // namespace detail

Communicator make_torch_world(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                              const GroupOptions& options) {
  if (!group) throw InvalidArgument("comm.make_torch_world", "the process group is null");
  auto info = detail::make_info(options, group->getRank(), group->getSize());
  try {
    (void)group->getBackend(at::kCPU);
  } catch (const c10::Error&) {
    throw NotSupported(
        "comm.make_torch_world",
        fmt::format("rank {}/{} group \"{}\": the process group's backend {} carries no CPU "
                    "tensors, expected gloo, mpi or cpu:gloo,cuda:nccl (for NCCL over CUDA "
                    "devices: make_nccl_world with such a group for its start)",
                    info.rank, info.size, info.name, group->getBackendName()));
  }
  info.deterministic = true;
  auto transport = std::make_shared<detail::TorchTransport>(
      std::make_unique<detail::ProcessGroupPort>(group),
      detail::WorldNumbers::of_process().next(group), info.rank);
  std::vector<int> members;
  for (int r = 0; r < info.size; ++r) members.push_back(r);
  constexpr int kWorldGroup = 1;  // 0 is the control channel
  const auto lease = std::make_shared<detail::Lease>(std::move(transport), info.size);
  return Communicator(
      detail::TorchGroup::make(lease, std::move(info), kWorldGroup, std::move(members)));
}

}  // namespace meshloom::comm
