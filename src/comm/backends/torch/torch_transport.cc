#include "comm/backends/torch/torch_transport.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "comm/internal/group.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::detail {
namespace {

// Tags: group id, a bit for send_receive, then what tells messages of one pair apart.
constexpr int kLaneBits = 20;
constexpr int kIndexBits = 12;
// A call that nobody waits for must not hold its thread for ever: the process group gets this much
// longer than the call's own limit.
constexpr std::chrono::seconds kAfterDeadline{5};

std::byte* bytes_of(const at::Tensor& tensor) {
  return static_cast<std::byte*>(const_cast<void*>(tensor.const_data_ptr()));
}

}  // namespace

TorchMessage::~TorchMessage() = default;
TorchPort::~TorchPort() = default;

TorchTransport::~TorchTransport() {
  std::vector<std::shared_ptr<Call>> calls;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    for (const auto& weak : calls_) {
      if (auto call = weak.lock()) calls.push_back(std::move(call));
    }
    changed_.notify_all();
  }
  for (const auto& call : calls) {
    const std::lock_guard lock(call->mutex);
    call->aborted = true;
    for (const auto& open : call->messages) open.message->abort();
  }
  for (auto& thread : threads_) thread.join();
}

int TorchTransport::tag_of(Call& call, int peer, bool send) {
  Group& group = *call.group;
  if (call.work->request().operation == Operation::kSendReceive) {
    const std::int64_t count = (send ? group.sent : group.received)[peer]++;
    return (group.id << (kLaneBits + 1)) | (1 << kLaneBits) |
           static_cast<int>(count & ((1 << kLaneBits) - 1));
  }
  const int index = (send ? call.lanes_out : call.lanes_in)[peer]++;
  const auto sequence =
      static_cast<int>(call.work->request().sequence & ((1 << (kLaneBits - kIndexBits)) - 1));
  return (group.id << (kLaneBits + 1)) | (sequence << kIndexBits) |
         (index & ((1 << kIndexBits) - 1));
}

void TorchTransport::post(Call& call, const Phase& phase) {
  const std::lock_guard lock(call.mutex);
  call.messages.clear();
  if (call.aborted) throw CommError("comm.torch", "aborted");
  const auto& members = call.group->members;
  for (const bool send : {false, true}) {
    for (const Block& block : send ? phase.sends : phase.receives) {
      if (block.peer == call.group->rank) continue;
      const int tag = tag_of(call, block.peer, send);
      const int peer = members[block.peer];
      call.messages.push_back(
          {block.peer, send ? port_->send(peer, block.data, block.bytes, tag)
                            : port_->receive(peer, block.data, block.bytes, tag)});
    }
  }
}

void TorchTransport::finish_part(Call& call) {
  if (call.remaining.fetch_sub(1) == 1) call.work->complete();
}

// Messages to oneself match in order over all calls of the group, like any others.
void TorchTransport::post_to_self(const std::shared_ptr<Call>& call) {
  Group& group = *call->group;
  const Request& request = call->work->request();
  std::vector<std::pair<Group::Half, Group::Half>> matches;
  {
    const std::lock_guard lock(group.mutex);
    for (const Message& send : request.sends) {
      if (send.peer != group.rank) continue;
      ++call->remaining;
      if (group.self_receives.empty()) {
        group.self_sends.push_back({call, send.tensor});
      } else {
        matches.emplace_back(Group::Half{call, send.tensor}, group.self_receives.front());
        group.self_receives.pop_front();
      }
    }
    for (const Message& receive : request.receives) {
      if (receive.peer != group.rank) continue;
      ++call->remaining;
      if (group.self_sends.empty()) {
        group.self_receives.push_back({call, receive.tensor});
      } else {
        matches.emplace_back(group.self_sends.front(), Group::Half{call, receive.tensor});
        group.self_sends.pop_front();
      }
    }
  }
  for (const auto& [send, receive] : matches) {
    if (send.tensor.nbytes() != receive.tensor.nbytes()) {
      throw CommError("comm.torch", fmt::format("this rank sends itself {} bytes, and receives {}",
                                                send.tensor.nbytes(), receive.tensor.nbytes()));
    }
    if (send.tensor.nbytes() > 0) {
      std::memcpy(bytes_of(receive.tensor), bytes_of(send.tensor), send.tensor.nbytes());
    }
    finish_part(*send.call);
    finish_part(*receive.call);
  }
}

void TorchTransport::start(const std::shared_ptr<Group>& group,
                           const std::shared_ptr<WorkImpl>& work) {
  {
    const std::lock_guard lock(group->mutex);
    if (group->aborted) return work->fail("aborted: " + group->reason);
  }
  auto call = std::make_shared<Call>();
  call->group = group;
  call->work = work;
  call->schedule = make_schedule(work->request(), group->rank,
                                 static_cast<int>(group->members.size()), ScheduleLimits{});
  try {
    if (work->request().operation == Operation::kSendReceive) post_to_self(call);
    if (!call->schedule.phases.empty()) post(*call, call->schedule.phases.front());
  } catch (const std::exception& error) {
    work->fail(error.what());
    return abort(group, error.what());
  }
  if (call->messages.empty() && call->schedule.phases.size() <= 1) {
    if (!call->schedule.phases.empty() && call->schedule.phases[0].finish) {
      call->schedule.phases[0].finish();
    }
    return finish_part(*call);
  }
  const std::lock_guard lock(mutex_);
  std::erase_if(calls_, [](const auto& other) { return other.expired(); });
  calls_.push_back(call);
  queue_.push_back(std::move(call));
  if (static_cast<int>(queue_.size()) > idle_) threads_.emplace_back([this] { work_off(); });
  changed_.notify_one();
}

void TorchTransport::work_off() {
  std::unique_lock lock(mutex_);
  while (true) {
    ++idle_;
    changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    --idle_;
    if (queue_.empty()) return;
    auto call = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    wait_for(call);
    call.reset();
    lock.lock();
  }
}

void TorchTransport::wait_for(const std::shared_ptr<Call>& call) {
  auto& phases = call->schedule.phases;
  try {
    for (std::size_t p = 0; p < phases.size(); ++p) {
      if (p > 0) post(*call, phases[p]);
      for (const auto& open : call->messages) {
        call->waits_for = open.peer;
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
            call->work->deadline() + kAfterDeadline - std::chrono::steady_clock::now());
        open.message->wait(std::max(left, std::chrono::milliseconds(1)));
      }
      if (phases[p].finish) phases[p].finish();
    }
    call->waits_for = -1;
    finish_part(*call);
  } catch (const std::exception& error) {
    const std::string text = fmt::format(
        "rank {} of the process group: {}",
        call->group->members[call->waits_for >= 0 ? call->waits_for.load() : call->group->rank],
        error.what());
    call->work->fail(text);
    abort(call->group, text);
  }
}

void TorchTransport::abort(const std::shared_ptr<Group>& group, const std::string& reason) {
  std::vector<std::shared_ptr<Group>> children;
  std::deque<Group::Half> halves;
  {
    const std::lock_guard lock(group->mutex);
    if (group->aborted) return;
    group->aborted = true;
    group->reason = reason;
    halves.swap(group->self_sends);
    for (auto& half : group->self_receives) halves.push_back(std::move(half));
    group->self_receives.clear();
    for (const auto& weak : group->children) {
      if (auto child = weak.lock()) children.push_back(std::move(child));
    }
  }
  if (const auto owner = group->owner.lock()) owner->fail_tracked(reason);
  std::vector<std::shared_ptr<Call>> calls;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& weak : calls_) {
      if (auto call = weak.lock(); call && call->group == group) calls.push_back(std::move(call));
    }
  }
  for (const auto& call : calls) {
    const std::lock_guard lock(call->mutex);
    call->aborted = true;
    for (const auto& open : call->messages) open.message->abort();
  }
  for (const auto& child : children) abort(child, reason);
}

std::vector<int> TorchTransport::missing(const WorkImpl& work) {
  const std::lock_guard lock(mutex_);
  for (const auto& weak : calls_) {
    const auto call = weak.lock();
    if (call && call->work.get() == &work && call->waits_for >= 0) return {call->waits_for.load()};
  }
  return {};
}

}  // namespace meshloom::comm::detail
