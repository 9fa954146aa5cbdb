#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "comm/internal/request.h"
#include "comm/internal/staging.h"
#include "meshloom/comm/flight_recorder.h"
#include "meshloom/comm/traffic.h"
#include "meshloom/core/export.h"

namespace meshloom::comm::detail {

class GroupImpl;

/// What a group moved, by purpose. Calls that outlive their group still write to it. Thread safe
/// under its mutex.
struct Account {
  std::mutex mutex;
  Traffic traffic;
};

/// State of one started call. The backend ends it exactly once, by `complete` or `fail`; whoever
/// comes second is ignored. Tensors on a device, where the backend moves host memory, are staged:
/// the backend sees host tensors in the request, the waiter gets device tensors.
class MESHLOOM_API WorkImpl {
 public:
  WorkImpl(const std::shared_ptr<GroupImpl>& group, Request request, std::optional<Staging> staging,
           std::string purpose, std::chrono::milliseconds limit, std::int64_t record);

  [[nodiscard]] const Request& request() const { return request_; }
  [[nodiscard]] const std::string& purpose() const { return purpose_; }
  [[nodiscard]] std::chrono::steady_clock::time_point deadline() const { return start_ + limit_; }
  [[nodiscard]] bool done() const noexcept { return done_.load(std::memory_order_acquire); }
  void wait(std::optional<std::chrono::milliseconds> limit);
  [[nodiscard]] at::Tensor output() const;

  /// Ends the call well. All tensors but a result are let go, before anybody hears of the end;
  /// nobody may touch the request's tensors any more.
  void complete();
  /// Ends it with CommError '[comm.<operation>] rank .. group ..: <text>'. Tensors stay held.
  void fail(const std::string& text);

  /// Hands a piece of the work to whoever waits (once); it runs on the waiting thread.
  void offer(std::function<void()> helper);

  /// '[comm.x]' and 'rank 1/4 group "world" (purpose exchange, call 12, in <what it was doing>)'.
  [[nodiscard]] std::string where() const;
  [[nodiscard]] std::string who() const;
  [[nodiscard]] double age_seconds() const;

 private:
  bool end(std::exception_ptr error);
  [[nodiscard]] bool has_output() const;
  void wait_until(std::chrono::steady_clock::time_point until, std::chrono::milliseconds limit);
  void expire(std::chrono::milliseconds limit);

  std::weak_ptr<GroupImpl> group_;
  std::shared_ptr<FlightRecorder> recorder_;
  std::shared_ptr<Account> account_;
  std::int64_t record_;
  int rank_;
  int size_;
  std::string group_name_;
  std::shared_ptr<const std::string> doing_;
  Request request_;
  std::optional<Staging> staging_;
  std::string purpose_;
  std::chrono::steady_clock::time_point start_;
  std::chrono::milliseconds limit_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> done_{false};
  bool ending_ = false;
  std::exception_ptr error_;
  std::function<void()> helper_;
};

}  // namespace meshloom::comm::detail
