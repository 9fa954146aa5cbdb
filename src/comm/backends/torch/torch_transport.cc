#include "comm/backends/torch/torch_transport.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "comm/internal/group.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::detail {
namespace {

// Tags, from the top: world, group, a bit for send_receive, a bit for payloads after their frame,
// then what tells messages of one pair apart (collectives: the call and the message in it). The
// lowest group id is the world's control channel; no tag is below 2^18.
constexpr int kLaneBits = 17;
constexpr int kIndexBits = 10;
constexpr int kBodyBit = 1 << kLaneBits;
constexpr int kMessagesBit = kBodyBit << 1;
constexpr int kGroupShift = kLaneBits + 2;
constexpr int kWorldShift = kGroupShift + 9;
static_assert(TorchTransport::kGroups == 1 << (kWorldShift - kGroupShift));
static_assert(TorchTransport::kWorlds == 1 << (31 - kWorldShift));

struct FrameHeader {
  std::uint64_t call = 0;  // hash of what both sides must agree on
  std::int64_t bytes = 0;
  std::int32_t operation = 0;
  std::int32_t dtype = -1;
};
constexpr std::int64_t kInlineBytes = TorchTransport::kFrameBytes - sizeof(FrameHeader);

struct AbortNotice {
  std::int32_t group = 0;
  std::int32_t length = 0;
};

std::byte* bytes_of(const at::Tensor& tensor) {
  return static_cast<std::byte*>(const_cast<void*>(tensor.const_data_ptr()));
}

// FNV-1a: equal on all ranks, which std::hash need not be.
std::uint64_t hash_of(const std::string& text) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
  return hash;
}

}  // namespace

TorchMessage::~TorchMessage() = default;
TorchPort::~TorchPort() = default;

TorchTransport::TorchTransport(std::unique_ptr<TorchPort> port, int world, int rank)
    : port_(std::move(port)), world_(world), rank_(rank) {}

TorchTransport::~TorchTransport() {
  // What was never sent or received is still in the queues of the process group, which may outlive
  // this world: Gloo stops serving a peer when it meets a buffer that is gone. Such buffers stay
  // until the process ends.
  static std::mutex mutex;
  static auto* const immortal = new std::vector<std::shared_ptr<void>>;
  const std::lock_guard lock(mutex);
  immortal->insert(immortal->end(), graves_.begin(), graves_.end());
  immortal->insert(immortal->end(), notices_.begin(), notices_.end());
  if (inbox_) immortal->push_back(inbox_);
}

int TorchTransport::control_tag() const {
  return (world_ << kWorldShift) | kMessagesBit | kBodyBit;
}

void TorchTransport::open() {
  auto inbox = std::make_shared<Notice>();
  inbox->message = port_->receive_from_any(inbox->frame.data(), kFrameBytes, control_tag());
  if (!inbox->message) return;
  inbox_ = std::move(inbox);
  threads_.emplace_back([self = shared_from_this()] { self->listen(); });
}

void TorchTransport::close() {
  std::vector<std::shared_ptr<Call>> calls;
  std::vector<std::thread> threads;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    for (const auto& weak : calls_) {
      if (auto call = weak.lock()) calls.push_back(std::move(call));
    }
    if (inbox_) inbox_->message->abort();
    threads.swap(threads_);
    changed_.notify_all();
  }
  for (const auto& call : calls) {
    const std::lock_guard lock(call->mutex);
    call->aborted = true;
    for (const auto& open : call->opens) {
      open.head->abort();
      if (open.body) open.body->abort();
    }
  }
  for (auto& thread : threads) {
    if (thread.get_id() == std::this_thread::get_id()) {
      thread.detach();  // the last handle went away on a thread of ours; it holds the transport
    } else {
      thread.join();
    }
  }
}

void TorchTransport::add_group(const std::shared_ptr<Group>& group) {
  std::string reason;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(groups_, [](const auto& entry) { return entry.second.expired(); });
    groups_[group->id] = group;
    if (const auto early = early_aborts_.find(group->id); early != early_aborts_.end()) {
      reason = early->second;
      early_aborts_.erase(early);
    }
  }
  if (!reason.empty()) abort(group, reason, false);
}

int TorchTransport::tag_of(Call& call, int peer, bool send) {
  Group& group = *call.group;
  const int base = (world_ << kWorldShift) | (group.id << kGroupShift);
  if (call.work->request().operation == Operation::kSendReceive) {
    const std::int64_t count = (send ? group.sent : group.received)[peer]++;
    return base | kMessagesBit | static_cast<int>(count & (kBodyBit - 1));
  }
  const int index = (send ? call.lanes_out : call.lanes_in)[peer]++;
  const auto sequence =
      static_cast<int>(call.work->request().sequence & ((1 << (kLaneBits - kIndexBits)) - 1));
  return base | (sequence << kIndexBits) | (index & ((1 << kIndexBits) - 1));
}

void TorchTransport::write_frame(const Call& call, const Block& block, Frame& frame) const {
  const Request& request = call.work->request();
  FrameHeader header;
  header.call = hash_of(signature(request));
  header.bytes = block.bytes;
  header.operation = static_cast<std::int32_t>(request.operation);
  if (request.input.defined()) {
    header.dtype = static_cast<std::int32_t>(request.input.scalar_type());
  }
  std::memcpy(frame.data(), &header, sizeof(header));
  if (block.bytes > 0 && block.bytes <= kInlineBytes) {
    std::memcpy(frame.data() + sizeof(header), block.data, static_cast<std::size_t>(block.bytes));
  }
}

// Compares a frame that came in with what this rank expects, and takes or asks for the payload.
void TorchTransport::take_frame(Call& call, std::size_t index) {
  Call::Open& open = call.opens[index];
  FrameHeader header;
  std::memcpy(&header, open.frame->data(), sizeof(header));
  const Request& request = call.work->request();
  const std::string mine = signature(request);
  if (header.operation != static_cast<std::int32_t>(request.operation)) {
    throw InvalidArgument(
        "comm.torch",
        fmt::format("the ranks disagree about the call {}: rank {} made {}", mine, open.block.peer,
                    name_of(static_cast<Operation>(header.operation))));
  }
  if (header.call != hash_of(mine) || header.bytes != open.block.bytes) {
    throw InvalidArgument(
        "comm.torch",
        fmt::format(
            "the ranks disagree about the call {}: rank {} sent {} bytes{}, expected {}", mine,
            open.block.peer, header.bytes,
            header.dtype < 0
                ? ""
                : fmt::format(" of {}", c10::toString(static_cast<c10::ScalarType>(header.dtype))),
            open.block.bytes));
  }
  if (header.bytes <= kInlineBytes) {
    if (header.bytes > 0) {
      std::memcpy(open.block.data, open.frame->data() + sizeof(header),
                  static_cast<std::size_t>(header.bytes));
    }
    return;
  }
  const std::lock_guard lock(call.mutex);
  if (call.aborted) throw CommError("comm.torch", "aborted");
  open.body = port_->receive(call.group->members[open.block.peer], open.block.data,
                             open.block.bytes, open.tag | kBodyBit);
}

void TorchTransport::post(Call& call, const Phase& phase) {
  const std::lock_guard lock(call.mutex);
  call.opens.clear();
  if (call.aborted) throw CommError("comm.torch", "aborted");
  const auto& members = call.group->members;
  for (const bool send : {false, true}) {
    for (const Block& block : send ? phase.sends : phase.receives) {
      if (block.peer == call.group->rank) continue;
      Call::Open& open = call.opens.emplace_back();
      open.block = block;
      open.send = send;
      open.tag = tag_of(call, block.peer, send);
      open.frame = std::make_unique<Frame>();
      const int peer = members[block.peer];
      if (!send) {
        open.head = port_->receive(peer, open.frame->data(), kFrameBytes, open.tag);
        continue;
      }
      write_frame(call, block, *open.frame);
      open.head = port_->send(peer, open.frame->data(), kFrameBytes, open.tag);
      if (block.bytes > kInlineBytes) {
        open.body = port_->send(peer, block.data, block.bytes, open.tag | kBodyBit);
      }
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
      throw InvalidArgument("comm.torch",
                            fmt::format("this rank sends itself {} bytes, and receives {}",
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
  {
    const std::lock_guard lock(mutex_);
    if (stop_) return work->fail("aborted: the world is closed");
    std::erase_if(calls_, [](const auto& other) { return other.expired(); });
    calls_.push_back(call);
  }
  try {
    if (work->request().operation == Operation::kSendReceive) post_to_self(call);
    if (!call->schedule.phases.empty()) post(*call, call->schedule.phases.front());
  } catch (const std::exception& error) {
    {
      const std::lock_guard lock(mutex_);
      graves_.push_back(call);
    }
    work->fail(error.what());
    return abort(group, fmt::format("rank {}: {}", group->rank, error.what()), true);
  }
  if (call->opens.empty() && call->schedule.phases.size() <= 1) {
    if (!call->schedule.phases.empty() && call->schedule.phases[0].finish) {
      call->schedule.phases[0].finish();
    }
    return finish_part(*call);
  }
  const std::lock_guard lock(mutex_);
  queue_.push_back(std::move(call));
  if (stop_) return;
  if (static_cast<int>(queue_.size()) > idle_) {
    threads_.emplace_back([self = shared_from_this()] { self->work_off(); });
  }
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
      for (std::size_t i = 0; i < call->opens.size(); ++i) {
        if (call->opens[i].send) continue;
        call->waits_for = call->opens[i].block.peer;
        call->opens[i].head->wait();
        take_frame(*call, i);
      }
      for (const Call::Open& open : call->opens) {
        call->waits_for = open.block.peer;
        if (open.send) open.head->wait();
        if (open.body) open.body->wait();
      }
      if (phases[p].finish) phases[p].finish();
    }
    call->waits_for = -1;
    finish_part(*call);
  } catch (const std::exception& error) {
    {
      const std::lock_guard lock(mutex_);
      graves_.push_back(call);
    }
    bool aborted = false;
    {
      const std::lock_guard lock(call->mutex);
      aborted = call->aborted;
    }
    if (aborted) {  // whoever aborted has said why
      call->work->fail("aborted");
      return;
    }
    const int peer = call->waits_for;
    const std::string text =
        peer < 0 ? error.what() : fmt::format("waiting for rank {}: {}", peer, error.what());
    const std::string where = call->work->where();
    call->work->fail(text);
    abort(call->group, fmt::format("rank {} failed in {}: {}", call->group->rank, where, text),
          true);
  }
}

void TorchTransport::abort(const std::shared_ptr<Group>& group, const std::string& reason,
                           bool tell) {
  std::vector<std::shared_ptr<Group>> children;
  std::deque<Group::Half> halves;
  {
    const std::lock_guard lock(group->mutex);
    if (group->aborted) return;
    group->aborted = true;
    group->reason = reason.empty() ? "no reason given" : reason;
    halves.swap(group->self_sends);
    for (auto& half : group->self_receives) halves.push_back(std::move(half));
    group->self_receives.clear();
    for (const auto& weak : group->children) {
      if (auto child = weak.lock()) children.push_back(std::move(child));
    }
  }
  if (const auto owner = group->owner.lock()) owner->fail_tracked(group->reason);
  std::vector<std::shared_ptr<Call>> calls;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& weak : calls_) {
      if (auto call = weak.lock(); call && call->group == group) calls.push_back(std::move(call));
    }
    if (tell && !stop_) {
      for (const int member : group->members) {
        if (member == rank_) continue;
        auto shared = std::make_shared<Notice>();
        Notice& notice = *shared;
        AbortNotice header;
        header.group = group->id;
        header.length = static_cast<std::int32_t>(
            std::min<std::size_t>(group->reason.size(), kFrameBytes - sizeof(header)));
        std::memcpy(notice.frame.data(), &header, sizeof(header));
        std::memcpy(notice.frame.data() + sizeof(header), group->reason.data(),
                    static_cast<std::size_t>(header.length));
        try {
          notice.message = port_->send(member, notice.frame.data(), kFrameBytes, control_tag());
          notices_.push_back(std::move(shared));
        } catch (const std::exception&) {  // best effort: that rank finds out by its own limit
        }
      }
    }
  }
  for (const auto& call : calls) {
    const std::lock_guard lock(call->mutex);
    call->aborted = true;
    for (const auto& open : call->opens) {
      open.head->abort();
      if (open.body) open.body->abort();
    }
  }
  for (const auto& child : children) abort(child, reason, tell);
}

void TorchTransport::listen() {
  while (true) {
    try {
      inbox_->message->wait();
    } catch (const std::exception&) {
      return;  // closed, or the process group is broken: calls fail by themselves
    }
    AbortNotice header;
    std::memcpy(&header, inbox_->frame.data(), sizeof(header));
    const std::string reason(reinterpret_cast<const char*>(inbox_->frame.data()) + sizeof(header),
                             static_cast<std::size_t>(header.length));
    std::shared_ptr<Group> group;
    {
      const std::lock_guard lock(mutex_);
      const auto found = groups_.find(header.group);
      if (found != groups_.end()) {
        group = found->second.lock();
      } else {
        early_aborts_.emplace(header.group, reason);
      }
      if (stop_) return;
      try {
        inbox_->message = port_->receive_from_any(inbox_->frame.data(), kFrameBytes, control_tag());
      } catch (const std::exception&) {
        return;
      }
    }
    if (group) abort(group, reason, false);
  }
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
