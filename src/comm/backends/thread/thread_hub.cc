#include "comm/backends/thread/thread_hub.h"

#include <fmt/format.h>

#include <cstring>

namespace meshloom::comm::detail {

ThreadHub::ThreadHub(int size)
    : size_(size), lanes_(static_cast<std::size_t>(size) * static_cast<std::size_t>(size)) {}

void ThreadHub::post_collective(int rank, const std::shared_ptr<WorkImpl>& work) {
  std::vector<std::shared_ptr<WorkImpl>> ready;
  std::string wrong;
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) {
      wrong = reason_;
    } else {
      const std::int64_t sequence = work->request().sequence;
      Collective& call = pending_[sequence];
      if (call.posted == 0) {
        call.works.resize(static_cast<std::size_t>(size_));
        call.first = rank;
      }
      call.works[rank] = work;
      ++call.posted;
      const auto expected = signature(call.works[call.first]->request());
      const auto given = signature(work->request());
      if (expected != given) {
        wrong = fmt::format("the ranks disagree about call {}: rank {} made {}, rank {} {}",
                            sequence, call.first, expected, rank, given);
      } else if (call.posted == size_) {
        wrong = disagreement(call.works);
        if (wrong.empty()) {
          ready = std::move(call.works);
          pending_.erase(sequence);
        }
      }
    }
  }
  if (!wrong.empty()) {
    abort(wrong);
    work->fail("aborted: " + wrong);
  } else if (!ready.empty()) {
    run_collective(std::move(ready));
  }
}

void ThreadHub::post_exchange(int rank, const std::shared_ptr<WorkImpl>& work) {
  struct Match {
    Half send;
    Half receive;
  };
  const Request& request = work->request();
  const auto exchange = std::make_shared<Exchange>();
  exchange->work = work;
  // One more than there are messages, so that it can't end while its own halves are being posted.
  exchange->remaining = static_cast<int>(request.sends.size() + request.receives.size()) + 1;
  std::vector<Match> matches;
  std::string wrong;
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) {
      wrong = reason_;
    } else {
      for (const Message& send : request.sends) {
        Lane& to = lane(rank, send.peer);
        if (to.receives.empty()) {
          to.sends.push_back({exchange, send.tensor});
        } else {
          matches.push_back({{exchange, send.tensor}, std::move(to.receives.front())});
          to.receives.pop_front();
        }
      }
      for (const Message& receive : request.receives) {
        Lane& from = lane(receive.peer, rank);
        if (from.sends.empty()) {
          from.receives.push_back({exchange, receive.tensor});
        } else {
          matches.push_back({std::move(from.sends.front()), {exchange, receive.tensor}});
          from.sends.pop_front();
        }
      }
      for (const Match& match : matches) {
        const at::Tensor& sent = match.send.tensor;
        const at::Tensor& received = match.receive.tensor;
        if (sent.nbytes() != received.nbytes() || sent.scalar_type() != received.scalar_type()) {
          wrong = fmt::format("{} sends {} {} elements, {} receives {} {} elements",
                              match.send.owner->work->who(), sent.numel(),
                              c10::toString(sent.scalar_type()), match.receive.owner->work->who(),
                              received.numel(), c10::toString(received.scalar_type()));
        }
      }
    }
  }
  if (!wrong.empty()) {
    abort(wrong);
    for (const Match& match : matches) {
      match.send.owner->work->fail("aborted: " + wrong);
      match.receive.owner->work->fail("aborted: " + wrong);
    }
    work->fail("aborted: " + wrong);
    return;
  }
  const auto finish_one = [](Exchange& owner) {
    if (owner.remaining.fetch_sub(1) == 1) owner.work->complete();
  };
  for (const Match& match : matches) {
    if (match.send.tensor.nbytes() > 0) {
      std::memcpy(match.receive.tensor.mutable_data_ptr(), match.send.tensor.const_data_ptr(),
                  match.send.tensor.nbytes());
    }
    finish_one(*match.send.owner);
    finish_one(*match.receive.owner);
  }
  finish_one(*exchange);
}

std::vector<int> ThreadHub::missing(int rank, const WorkImpl& work) {
  std::vector<int> result;
  const std::lock_guard lock(mutex_);
  if (work.request().operation != Operation::kSendReceive) {
    const auto found = pending_.find(work.request().sequence);
    if (found == pending_.end()) return result;
    for (int r = 0; r < size_; ++r) {
      if (!found->second.works[r]) result.push_back(r);
    }
    return result;
  }
  const auto waits = [&](const std::deque<Half>& halves) {
    for (const Half& half : halves) {
      if (half.owner->work.get() == &work) return true;
    }
    return false;
  };
  for (int peer = 0; peer < size_; ++peer) {
    if (waits(lane(rank, peer).sends) || waits(lane(peer, rank).receives)) result.push_back(peer);
  }
  return result;
}

std::shared_ptr<ThreadHub> ThreadHub::child(std::int64_t number, int color, int size) {
  std::shared_ptr<ThreadHub> hub;
  std::string reason;
  {
    const std::lock_guard lock(mutex_);
    Child& forming = forming_[{number, color}];
    if (!forming.hub) {
      forming.hub = std::make_shared<ThreadHub>(size);
      std::erase_if(children_, [](const auto& child) { return child.expired(); });
      children_.push_back(forming.hub);
    }
    hub = forming.hub;
    if (++forming.joined == size) forming_.erase({number, color});
    if (aborted_) reason = reason_;
  }
  if (!reason.empty()) hub->abort(reason);
  return hub;
}

std::string ThreadHub::abort_reason() {
  const std::lock_guard lock(mutex_);
  return aborted_ && reason_.empty() ? "no reason given" : reason_;
}

void ThreadHub::abort(const std::string& reason) {
  std::vector<std::shared_ptr<WorkImpl>> works;
  std::vector<std::shared_ptr<ThreadHub>> children;
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) return;
    aborted_ = true;
    reason_ = reason;
    for (auto& [sequence, call] : pending_) {
      for (auto& work : call.works) {
        if (work) works.push_back(std::move(work));
      }
    }
    pending_.clear();
    for (Lane& lane : lanes_) {
      for (const Half& half : lane.sends) works.push_back(half.owner->work);
      for (const Half& half : lane.receives) works.push_back(half.owner->work);
      lane = Lane();
    }
    for (const auto& child : children_) {
      if (auto hub = child.lock()) children.push_back(std::move(hub));
    }
  }
  for (const auto& work : works) work->fail("aborted: " + reason);
  for (const auto& child : children) child->abort(reason);
}

}  // namespace meshloom::comm::detail
