#include "meshloom/comm/flight_recorder.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

namespace meshloom::comm {
namespace {

const char* name_of_state(OperationState state) {
  switch (state) {
    case OperationState::kPending:
      return "pending";
    case OperationState::kDone:
      return "done";
    case OperationState::kFailed:
      return "failed";
  }
  return "";
}

double seconds_of(std::chrono::nanoseconds duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

FlightRecorder::FlightRecorder(std::size_t capacity)
    : capacity_(std::max<std::size_t>(capacity, 1)),
      context_(std::make_shared<const std::string>()) {}

void FlightRecorder::set_context(const std::string& context) {
  auto shared = std::make_shared<const std::string>(context);
  const std::lock_guard lock(mutex_);
  context_ = std::move(shared);
}

std::int64_t FlightRecorder::begin(OperationRecord record) {
  record.started = std::chrono::system_clock::now();
  const std::lock_guard lock(mutex_);
  record.id = next_++;
  // Pending calls at the front stay until the ring is twice its size: they are what a report needs.
  while (entries_.size() >= capacity_ &&
         (entries_.front().record.state != OperationState::kPending ||
          entries_.size() >= 2 * capacity_)) {
    entries_.pop_front();
  }
  entries_.push_back({std::move(record), context_, std::chrono::steady_clock::now()});
  return next_ - 1;
}

void FlightRecorder::end(std::int64_t id, bool ok) {
  const auto now = std::chrono::steady_clock::now();
  const std::lock_guard lock(mutex_);
  if (entries_.empty() || id < entries_.front().record.id) return;
  Entry& entry = entries_[static_cast<std::size_t>(id - entries_.front().record.id)];
  entry.record.state = ok ? OperationState::kDone : OperationState::kFailed;
  entry.record.duration = now - entry.start;
}

OperationRecord FlightRecorder::snapshot(const Entry& entry) {
  OperationRecord result = entry.record;
  result.context = *entry.context;
  if (result.state == OperationState::kPending) {
    result.duration = std::chrono::steady_clock::now() - entry.start;
  }
  return result;
}

std::vector<OperationRecord> FlightRecorder::records() const {
  const std::lock_guard lock(mutex_);
  std::vector<OperationRecord> result;
  result.reserve(entries_.size());
  for (const Entry& entry : entries_) result.push_back(snapshot(entry));
  return result;
}

std::vector<OperationRecord> FlightRecorder::pending() const {
  const std::lock_guard lock(mutex_);
  std::vector<OperationRecord> result;
  for (const Entry& entry : entries_) {
    if (entry.record.state == OperationState::kPending) result.push_back(snapshot(entry));
  }
  return result;
}

std::string FlightRecorder::to_text() const {
  std::string result;
  for (const OperationRecord& record : records()) {
    result += fmt::format(
        "#{} rank {}/{} group \"{}\" {} {} purpose {} sent {} B received {} B {} {:.6f} s",
        record.id, record.rank, record.size, record.group, record.operation, record.sequence,
        record.purpose, record.sent_bytes, record.received_bytes, name_of_state(record.state),
        seconds_of(record.duration));
    if (!record.peers.empty()) result += fmt::format(" peers {}", fmt::join(record.peers, ","));
    if (!record.context.empty()) result += fmt::format(" ({})", record.context);
    result += '\n';
  }
  return result;
}

std::string FlightRecorder::to_json() const {
  auto result = nlohmann::ordered_json::array();
  for (const OperationRecord& record : records()) {
    result.push_back({{"id", record.id},
                      {"group", record.group},
                      {"rank", record.rank},
                      {"size", record.size},
                      {"operation", record.operation},
                      {"sequence", record.sequence},
                      {"purpose", record.purpose},
                      {"context", record.context},
                      {"sent_bytes", record.sent_bytes},
                      {"received_bytes", record.received_bytes},
                      {"peers", record.peers},
                      {"state", name_of_state(record.state)},
                      {"started", seconds_of(record.started.time_since_epoch())},
                      {"duration", seconds_of(record.duration)}});
  }
  // Names come from callers: bytes that are no UTF-8 must not stop a report.
  return result.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace meshloom::comm
