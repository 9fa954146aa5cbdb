#include "meshloom/comm/watchdog.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <thread>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom::comm {

class Watchdog::Impl {
 public:
  Impl(Communicator world, WatchdogOptions options)
      : world_(std::move(world)), options_(std::move(options)) {
    thread_ = std::thread([this] { run(); });
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  [[nodiscard]] int reports() const { return reports_; }

 private:
  void run() {
    using std::chrono::milliseconds;
    const auto period = std::clamp(options_.patience / 4, milliseconds(1), milliseconds(1000));
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, period, [this] { return stop_; })) {
      lock.unlock();
      check();
      lock.lock();
    }
  }

  void check() {
    std::int64_t newest = reported_;
    for (const OperationRecord& record : world_.recorder().pending()) {
      if (record.duration > options_.patience) newest = std::max(newest, record.id);
    }
    if (newest == reported_) return;
    reported_ = newest;
    ++reports_;
    const std::string report = world_.report();
    try {
      write("txt", report);
      write("json", world_.recorder().to_json());
      options_.on_hang(report);
    } catch (...) {  // a watchdog that throws would end the process that it watches
    }
  }

  void write(const char* kind, const std::string& text) const {
    if (options_.folder.empty()) return;
    std::ofstream file(fmt::format("{}/hang_rank{}.{}", options_.folder, world_.rank(), kind));
    file << text;
  }

  Communicator world_;
  const WatchdogOptions options_;
  std::int64_t reported_ = -1;
  std::atomic<int> reports_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stop_ = false;
  std::thread thread_;
};

Watchdog::Watchdog(Communicator world, WatchdogOptions options) {
  MESHLOOM_CHECK_GT(options.patience.count(), 0, "comm.watchdog", "patience in milliseconds");
  MESHLOOM_CHECK(options.on_hang != nullptr, "comm.watchdog",
                 "on_hang is empty, expected a function that takes the report");
  impl_ = std::make_unique<Impl>(std::move(world), std::move(options));
}

Watchdog::~Watchdog() = default;

int Watchdog::reports() const { return impl_->reports(); }

}  // namespace meshloom::comm
