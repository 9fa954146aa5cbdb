// What ranks tell each other beside the data: that a group is aborted, and that a process leaves.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "comm/backends/mpi/mpi_engine.h"
#include "comm/backends/mpi/mpi_support.h"

namespace meshloom::comm::detail {
namespace {

constexpr std::size_t kNoticeBytes = 1024;
// A rank that left has ended its own calls, so what it sent is on its way: this is how long we look
// for it before a call that still waits for that rank is given up.
constexpr std::chrono::seconds kGrace{2};
// After a failure the peers may be dead: nobody waits long for their goodbye.
constexpr std::chrono::milliseconds kFailedGoodbye{5000};

struct NoticeHeader {
  std::int32_t kind = 0;
  std::int32_t group = 0;
  std::int32_t length = 0;
};

}  // namespace

void MpiEngine::listen() {
  inbox_.resize(kNoticeBytes);
  check_mpi(MPI_Irecv(inbox_.data(), static_cast<int>(inbox_.size()), MPI_BYTE, MPI_ANY_SOURCE, 0,
                      control_, &inbox_request_),
            "MPI_Irecv");
}

void MpiEngine::send_notice(int world_rank, NoticeKind kind, int group, const std::string& text) {
  NoticeHeader header;
  header.kind = static_cast<std::int32_t>(kind);
  header.group = group;
  header.length = static_cast<std::int32_t>(std::min(text.size(), kNoticeBytes - sizeof(header)));
  Outgoing& notice = outbox_.emplace_back();
  notice.bytes.resize(sizeof(header) + static_cast<std::size_t>(header.length));
  std::memcpy(notice.bytes.data(), &header, sizeof(header));
  std::memcpy(notice.bytes.data() + sizeof(header), text.data(),
              static_cast<std::size_t>(header.length));
  // Best effort: a peer that can't be told finds out by its own time limit.
  if (MPI_Isend(notice.bytes.data(), static_cast<int>(notice.bytes.size()), MPI_BYTE, world_rank, 0,
                control_, &notice.request) != MPI_SUCCESS) {
    outbox_.pop_back();
  }
}

bool MpiEngine::poll_control() {
  for (auto notice = outbox_.begin(); notice != outbox_.end();) {
    int sent = 0;
    MPI_Test(&notice->request, &sent, MPI_STATUS_IGNORE);
    notice = sent != 0 ? outbox_.erase(notice) : std::next(notice);
  }
  int heard = 0;
  MPI_Status status;
  if (MPI_Test(&inbox_request_, &heard, &status) != MPI_SUCCESS || heard == 0) return false;
  NoticeHeader header;
  std::memcpy(&header, inbox_.data(), sizeof(header));
  const std::string text(inbox_.data() + sizeof(header), static_cast<std::size_t>(header.length));
  listen();
  if (header.kind == static_cast<std::int32_t>(NoticeKind::kGoodbye)) {
    departed_.emplace(status.MPI_SOURCE, std::chrono::steady_clock::now());
  } else {
    const auto found = groups_.find(header.group);
    if (found == groups_.end()) {
      early_aborts_.emplace(header.group, text);
    } else if (const auto group = found->second.lock()) {
      abort(group, text, false);
    }
  }
  return true;
}

void MpiEngine::check_departed() {
  if (departed_.empty() || calls_.empty()) return;
  const auto now = std::chrono::steady_clock::now();
  for (const Call& call : calls_) {
    for (std::size_t i = 0; i < call.requests.size(); ++i) {
      if (call.requests[i] == MPI_REQUEST_NULL || call.expected[i] < 0) continue;
      const auto left = departed_.find(call.group->members[call.peers[i]]);
      if (left == departed_.end() || now - left->second < kGrace) continue;
      abort(call.group, fmt::format("rank {} has left the program", call.peers[i]), true);
      return;
    }
  }
}

void MpiEngine::leave() {
  const auto until =
      std::chrono::steady_clock::now() + (failed_ ? std::min(limit_, kFailedGoodbye) : limit_);
  for (int r = 0; r < size_; ++r) {
    if (r != rank_) send_notice(r, NoticeKind::kGoodbye, 0, "");
  }
  while (static_cast<int>(departed_.size()) < size_ - 1 || !outbox_.empty()) {
    if (std::chrono::steady_clock::now() > until) return;  // somebody is dead: no MPI_Finalize
    if (!poll_control()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    poll_graves();
  }
  if (broken_) return;
  MPI_Cancel(&inbox_request_);
  MPI_Wait(&inbox_request_, MPI_STATUS_IGNORE);
  if (!graves_.empty()) return finish_without_free();
  MPI_Comm_free(&data_);
  MPI_Comm_free(&control_);
  if (own_mpi_) MPI_Finalize();
}

void MpiEngine::finish_without_free() {
  // Sends that nobody will receive: the communicators can't be freed, but every rank is here, so
  // MPI itself can end.
  if (own_mpi_) MPI_Finalize();
}

}  // namespace meshloom::comm::detail
