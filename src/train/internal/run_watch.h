#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "meshloom/comm/communicator.h"
#include "meshloom/comm/watchdog.h"

namespace meshloom::train::detail {

/// Keeps one rank's flight recorder at hand while a run goes on: `<folder>/flight/rank-R.txt` gets
/// a section, headed by time and reason, when a call hangs, when the rank fails, and when
/// Trainer::request_report was called. Owns two threads; the destructor ends them at once.
class RunWatch {
 public:
  using Told = std::function<void(const std::string& report)>;

  /// @param folder   the run's; exists
  /// @param seconds  a call that is pending for longer is reported; 0: none is
  /// @param on_hang  also gets the report of a hang or of a request, on a thread of this object;
  ///                 may be empty
  RunWatch(comm::Communicator world, std::string folder, double seconds, Told on_hang);
  ~RunWatch();
  RunWatch(const RunWatch&) = delete;
  RunWatch& operator=(const RunWatch&) = delete;

  /// Adds a section to the file. What fails is dropped: it must not hide what went wrong before.
  void write(const std::string& reason) noexcept;

 private:
  void watch_requests();
  void tell(const std::string& reason, const std::string& report) noexcept;

  comm::Communicator world_;
  const std::string path_;
  const Told on_hang_;
  std::mutex file_mutex_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stop_ = false;
  int answered_;
  std::thread requests_;
  std::unique_ptr<comm::Watchdog> watchdog_;
};

}  // namespace meshloom::train::detail
