#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"

namespace meshloom::comm {

struct WatchdogOptions {
  /// A call that is pending for longer is reported, once. Below the time limits of the calls it is
  /// a warning while the job still runs; the limits end it.
  std::chrono::milliseconds patience{std::chrono::seconds(60)};
  /// Called with the report, from the watchdog's thread. Required; what it throws is dropped.
  std::function<void(const std::string& report)> on_hang;
  /// Where the report and the recorder's calls go too, as `hang_rank<R>.txt` and
  /// `hang_rank<R>.json`; empty: nowhere. Must exist.
  std::string folder;
};

/// Watches the calls of one rank, over a world and all groups split from it, and turns a hang into
/// a report (Communicator::report): rank, operation, what the rank was doing (Label), the peers
/// that never came, and the calls before. Owns a thread; the destructor ends it at once.
class MESHLOOM_API Watchdog {
 public:
  /// @throws InvalidArgument  patience is not positive, or on_hang is empty.
  Watchdog(Communicator world, WatchdogOptions options);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Hangs reported so far.
  [[nodiscard]] int reports() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::comm
