#include "comm/internal/group.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "meshloom/core/check.h"
#include "meshloom/core/environment.h"

namespace meshloom::comm::detail {

void GroupList::add(const std::shared_ptr<GroupImpl>& group) {
  const std::lock_guard lock(mutex_);
  std::erase_if(groups_, [](const auto& other) { return other.expired(); });
  for (const auto& other : groups_) {
    if (other.lock() == group) return;
  }
  groups_.push_back(group);
}

std::vector<std::shared_ptr<GroupImpl>> GroupList::groups() const {
  std::vector<std::shared_ptr<GroupImpl>> result;
  const std::lock_guard lock(mutex_);
  for (const auto& weak : groups_) {
    if (auto group = weak.lock()) result.push_back(std::move(group));
  }
  return result;
}

GroupInfo make_info(const GroupOptions& options, int rank, int size) {
  MESHLOOM_CHECK_GE(size, 1, "comm.world", "size");
  MESHLOOM_CHECK(rank >= 0 && rank < size, "comm.world",
                 fmt::format("rank is {}, expected 0 <= rank < {}", rank, size));
  GroupInfo info;
  info.name = options.name;
  info.rank = rank;
  info.size = size;
  info.timeout = options.timeout ? *options.timeout : Environment::from_process().timeout;
  MESHLOOM_CHECK_GT(info.timeout.count(), 0, "comm.world", "timeout in milliseconds");
  info.deterministic = options.deterministic;
  info.recorder = std::make_shared<FlightRecorder>(options.recorded_calls);
  info.groups = std::make_shared<GroupList>();
  return info;
}

GroupInfo child_info(const GroupInfo& parent, const std::string& name, int rank, int size) {
  GroupInfo info = parent;
  info.name = name;
  info.rank = rank;
  info.size = size;
  return info;
}

GroupImpl::~GroupImpl() = default;

void GroupImpl::track(const std::shared_ptr<WorkImpl>& work) {
  const std::lock_guard lock(tracked_mutex_);
  while (!tracked_.empty()) {
    const auto oldest = tracked_.front().lock();
    if (oldest && !oldest->done()) break;
    tracked_.pop_front();
  }
  // An old call that hangs must not let the list grow with every later one.
  if (tracked_.size() >= tracked_limit_) {
    std::erase_if(tracked_, [](const auto& tracked) {
      const auto other = tracked.lock();
      return !other || other->done();
    });
    tracked_limit_ = 2 * tracked_.size() + 64;
  }
  tracked_.push_back(work);
}

std::vector<std::shared_ptr<WorkImpl>> GroupImpl::tracked() {
  std::vector<std::shared_ptr<WorkImpl>> works;
  const std::lock_guard lock(tracked_mutex_);
  for (const auto& tracked : tracked_) {
    if (auto work = tracked.lock(); work && !work->done()) works.push_back(std::move(work));
  }
  return works;
}

void GroupImpl::fail_tracked(const std::string& reason) {
  for (const auto& work : tracked()) work->fail("aborted: " + reason);
}

std::string GroupImpl::pending_report() {
  const auto works = tracked();
  std::string result;
  for (const auto& work : works) {
    const std::string peers = missing_peers(*work);
    result += fmt::format("[{}] {} for {:.3f} s; missing peers: {}\n", work->where(), work->who(),
                          work->age_seconds(), peers.empty() ? "unknown" : peers);
  }
  return result;
}

std::string GroupImpl::missing_peers(const WorkImpl& work) {
  std::vector<std::string> names;
  for (const int peer : missing(work)) {
    const bool of_world = ranks_of_world.empty();
    names.push_back(of_world ? fmt::format("{}", peer)
                             : fmt::format("{} (rank {} of the world)", peer,
                                           ranks_of_world[static_cast<std::size_t>(peer)]));
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

std::vector<GroupImpl::SplitVote> GroupImpl::gather_votes(int color, int key,
                                                          const std::string& name) {
  // int32 keeps the keys exact; the name travels as a hash so that ranks that split for different
  // reasons find out here and not in the first call on the new group.
  std::int32_t hash = 0;
  for (const char c : name) hash = static_cast<std::int32_t>((hash * 31LL + c) & 0x7fffffff);
  auto mine = at::empty({1, 4}, at::kInt);
  auto* values = mine.data_ptr<std::int32_t>();
  values[0] = color;
  values[1] = key;
  values[2] = hash;
  values[3] = split_token();
  const std::vector<std::int64_t> rows(static_cast<std::size_t>(info_.size), 1);
  CallOptions options;
  options.purpose = "split";
  Communicator self(shared_from_this());
  const at::Tensor all =
      self.all_gather(mine.to(device()), rows, options).result().to(at::kCPU).contiguous();
  std::vector<SplitVote> result;
  const auto* read = all.data_ptr<std::int32_t>();
  for (int r = 0; r < info_.size; ++r, read += 4) {
    if (read[2] != hash) {
      const auto text =
          fmt::format("rank {}/{} group \"{}\": rank {} splits under another name than \"{}\"",
                      info_.rank, info_.size, info_.name, r, name);
      abort(text);
      throw CommError("comm.split", text);
    }
    result.push_back({read[0], read[1], read[3]});
  }
  return result;
}

}  // namespace meshloom::comm::detail
