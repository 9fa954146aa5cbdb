// The one file that sees torch's c10d headers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "comm/backends/torch/torch_transport.h"
#include "comm/internal/group.h"
#include "meshloom/comm/torch_backend.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace detail {
namespace {

class ProcessGroupMessage final : public TorchMessage {
 public:
  ProcessGroupMessage(at::Tensor buffer, c10::intrusive_ptr<c10d::Work> work)
      : buffer_(std::move(buffer)), work_(std::move(work)) {}

  void wait(std::chrono::milliseconds limit) override {
    if (work_ && !work_->wait(limit)) throw CommError("comm.torch", "the message was aborted");
  }

  void abort() noexcept override {
    try {
      if (work_) work_->abort();
    } catch (...) {  // not every process group can; its wait then ends by its limit
    }
  }

 private:
  at::Tensor buffer_;
  c10::intrusive_ptr<c10d::Work> work_;
};

class ProcessGroupPort final : public TorchPort {
 public:
  explicit ProcessGroupPort(c10::intrusive_ptr<c10d::ProcessGroup> group)
      : group_(std::move(group)) {}

  std::unique_ptr<TorchMessage> send(int peer, std::byte* data, std::int64_t bytes,
                                     int tag) override {
    std::vector<at::Tensor> tensors{wrap(data, bytes)};
    auto work = group_->send(tensors, peer, tag);
    return std::make_unique<ProcessGroupMessage>(tensors[0], std::move(work));
  }

  std::unique_ptr<TorchMessage> receive(int peer, std::byte* data, std::int64_t bytes,
                                        int tag) override {
    std::vector<at::Tensor> tensors{wrap(data, bytes)};
    auto work = group_->recv(tensors, peer, tag);
    return std::make_unique<ProcessGroupMessage>(tensors[0], std::move(work));
  }

 private:
  // An empty message travels as one byte: not every process group sends empty tensors.
  static at::Tensor wrap(std::byte* data, std::int64_t bytes) {
    if (bytes == 0) return at::empty({1}, at::kByte);
    return at::from_blob(data, {bytes}, at::TensorOptions().dtype(at::kByte));
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

class TorchGroup final : public GroupImpl {
 public:
  using State = TorchTransport::Group;

  TorchGroup(GroupInfo info, std::shared_ptr<TorchTransport> transport,
             std::shared_ptr<State> state)
      : GroupImpl(std::move(info)), transport_(std::move(transport)), state_(std::move(state)) {}

  [[nodiscard]] std::string backend() const override { return "torch"; }
  void start(const std::shared_ptr<WorkImpl>& work) override { transport_->start(state_, work); }
  void abort(const std::string& reason) noexcept override { transport_->abort(state_, reason); }
  [[nodiscard]] std::vector<int> missing(const WorkImpl& work) override {
    return transport_->missing(work);
  }
  [[nodiscard]] std::int32_t split_token() override { return transport_->propose_id(); }

  [[nodiscard]] std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& place) override {
    if (!place) return nullptr;
    transport_->take_id(place->token);
    if (place->token >= TorchTransport::kGroups) {
      throw CommError("comm.split",
                      fmt::format("rank {}/{} group \"{}\": a torch world has tags for {} groups, "
                                  "all are taken",
                                  info().rank, info().size, info().name, TorchTransport::kGroups));
    }
    std::vector<int> members;
    for (const int member : place->members) members.push_back(state_->members[member]);
    const int size = static_cast<int>(members.size());
    auto child = make(transport_, child_info(info(), place->name, place->rank, size), place->token,
                      std::move(members));
    std::string reason;
    {
      const std::lock_guard lock(state_->mutex);
      if (state_->aborted) reason = state_->reason;
      std::erase_if(state_->children, [](const auto& other) { return other.expired(); });
      state_->children.push_back(child->state_);
    }
    if (!reason.empty()) child->abort(reason);
    return child;
  }

  static std::shared_ptr<TorchGroup> make(const std::shared_ptr<TorchTransport>& transport,
                                          GroupInfo info, int id, std::vector<int> members) {
    auto state = std::make_shared<State>();
    state->id = id;
    state->rank = info.rank;
    state->members = std::move(members);
    auto group = std::make_shared<TorchGroup>(std::move(info), transport, state);
    state->owner = group;
    return group;
  }

 private:
  std::shared_ptr<TorchTransport> transport_;
  std::shared_ptr<State> state_;
};

}  // namespace
}  // namespace detail

Communicator make_torch_world(const c10::intrusive_ptr<c10d::ProcessGroup>& group,
                              const GroupOptions& options) {
  if (!group) throw InvalidArgument("comm.make_torch_world", "the process group is null");
  auto info = detail::make_info(options, group->getRank(), group->getSize());
  info.deterministic = true;
  auto transport =
      std::make_shared<detail::TorchTransport>(std::make_unique<detail::ProcessGroupPort>(group));
  transport->take_id(1);
  std::vector<int> members;
  for (int r = 0; r < info.size; ++r) members.push_back(r);
  return Communicator(detail::TorchGroup::make(transport, std::move(info), 1, std::move(members)));
}

}  // namespace meshloom::comm
