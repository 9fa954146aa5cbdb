#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::comm {

/// What a rank does, in the words of a plan; whoever runs the plan sets it. -1 and empty: not said.
struct Label {
  std::int64_t step = -1;
  std::string instruction;  ///< "forward", "backward", "reduce", ...
  std::int64_t slot = -1;
  std::int64_t unit = -1;
  std::vector<std::int64_t> samples;  ///< ids
};

/// 'step 12 forward slot 3 unit 7 samples 4, 9'; without what is not said.
[[nodiscard]] MESHLOOM_API std::string to_string(const Label& label);

enum class OperationState : std::uint8_t { kPending, kDone, kFailed };

/// One communication call of one rank.
struct OperationRecord {
  std::int64_t id = 0;        ///< per recorder, in the order of the calls
  std::string group;          ///< name of the group
  int rank = 0;               ///< rank in that group
  int size = 1;               ///< ranks of that group
  std::string operation;      ///< "all_reduce", "send_receive", ...
  std::string purpose;        ///< CallOptions::purpose
  std::string context;        ///< what the rank was doing: label and set_context, as a sentence
  Label label;                ///< see FlightRecorder::set_label
  std::int64_t sequence = 0;  ///< per group: collectives and send_receive are counted apart
  std::int64_t sent_bytes = 0;
  std::int64_t received_bytes = 0;
  std::vector<int> peers;  ///< send_receive only
  OperationState state = OperationState::kPending;
  std::chrono::system_clock::time_point started;
  std::chrono::nanoseconds duration{0};  ///< until now for pending ones
};

/// A line without its end.
[[nodiscard]] MESHLOOM_API std::string to_text(const OperationRecord& record);

/// The last calls of one rank, over the world and all groups split from it. A ring: old calls that
/// have ended fall out, at most `capacity` are kept. Thread safe.
class MESHLOOM_API FlightRecorder {
 public:
  explicit FlightRecorder(std::size_t capacity);

  /// Kept with every call from now on, and part of the errors of those calls.
  void set_label(Label label);
  /// A sentence beside the label, for what no plan knows, e.g. "saving the checkpoint".
  void set_context(const std::string& context);
  /// Label and context as one sentence; empty when nothing is set.
  [[nodiscard]] std::shared_ptr<const std::string> doing() const;

  /// Adds a call that starts now. @returns its id.
  std::int64_t begin(OperationRecord record);
  void end(std::int64_t id, bool ok);

  [[nodiscard]] std::vector<OperationRecord> records() const;  ///< oldest first
  [[nodiscard]] std::vector<OperationRecord> pending() const;  ///< oldest first

  /// A line a call, oldest first.
  [[nodiscard]] std::string to_text() const;
  /// An array of objects with the fields of OperationRecord; times in seconds, state as a word.
  [[nodiscard]] std::string to_json() const;

 private:
  struct Context {
    Label label;
    std::string text;
    std::shared_ptr<const std::string> sentence = std::make_shared<const std::string>();
  };
  struct Entry {
    OperationRecord record;
    std::shared_ptr<const Context> context;
    std::chrono::steady_clock::time_point start;
  };
  static OperationRecord snapshot(const Entry& entry);
  void change(Context context);

  mutable std::mutex mutex_;
  std::size_t capacity_;
  std::int64_t next_ = 0;
  std::deque<Entry> entries_;  // ids are consecutive
  std::shared_ptr<const Context> context_;
};

}  // namespace meshloom::comm
