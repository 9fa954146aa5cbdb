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

nlohmann::ordered_json json_of(const Label& label) {
  return {{"step", label.step},
          {"instruction", label.instruction},
          {"slot", label.slot},
          {"unit", label.unit},
          {"samples", label.samples}};
}

}  // namespace

std::string to_string(const Label& label) {
  std::vector<std::string> parts;
  if (label.step >= 0) parts.push_back(fmt::format("step {}", label.step));
  if (!label.instruction.empty()) parts.push_back(label.instruction);
  if (label.slot >= 0) parts.push_back(fmt::format("slot {}", label.slot));
  if (label.unit >= 0) parts.push_back(fmt::format("unit {}", label.unit));
  if (!label.samples.empty()) {
    // A packed unit may hold thousands.
    constexpr std::size_t kShown = 8;
    const auto shown = std::min(label.samples.size(), kShown);
    auto text = fmt::format("samples {}",
                            fmt::join(label.samples.begin(), label.samples.begin() + shown, ", "));
    if (shown < label.samples.size())
      text += fmt::format(" and {} more", label.samples.size() - shown);
    parts.push_back(std::move(text));
  }
  return fmt::format("{}", fmt::join(parts, " "));
}

FlightRecorder::FlightRecorder(std::size_t capacity)
    : capacity_(std::max<std::size_t>(capacity, 1)), context_(std::make_shared<const Context>()) {}

void FlightRecorder::change(Context context) {
  auto sentence = to_string(context.label);
  if (!sentence.empty() && !context.text.empty()) sentence += ", ";
  sentence += context.text;
  context.sentence = std::make_shared<const std::string>(std::move(sentence));
  context_ = std::make_shared<const Context>(std::move(context));
}

void FlightRecorder::set_label(Label label) {
  const std::lock_guard lock(mutex_);
  change({std::move(label), context_->text, nullptr});
}

void FlightRecorder::set_context(const std::string& context) {
  const std::lock_guard lock(mutex_);
  change({context_->label, context, nullptr});
}

std::shared_ptr<const std::string> FlightRecorder::doing() const {
  const std::lock_guard lock(mutex_);
  return context_->sentence;
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
  result.context = *entry.context->sentence;
  result.label = entry.context->label;
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

std::string to_text(const OperationRecord& record) {
  auto result = fmt::format(
      "#{} rank {}/{} group \"{}\" {} {} purpose {} sent {} B received {} B {} {:.6f} s", record.id,
      record.rank, record.size, record.group, record.operation, record.sequence, record.purpose,
      record.sent_bytes, record.received_bytes, name_of_state(record.state),
      seconds_of(record.duration));
  if (!record.peers.empty()) result += fmt::format(" peers {}", fmt::join(record.peers, ","));
  if (!record.context.empty()) result += fmt::format(" ({})", record.context);
  return result;
}

std::string FlightRecorder::to_text() const {
  std::string result;
  for (const OperationRecord& record : records()) result += comm::to_text(record) + '\n';
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
                      {"label", json_of(record.label)},
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
