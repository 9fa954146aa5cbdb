#include "train/internal/run_watch.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "train/internal/requests.h"

namespace meshloom::train::detail {

namespace {

/// Between looks at whether somebody asked for a report; a signal handler can't wake a thread.
constexpr std::chrono::milliseconds kRequestPeriod{200};

}  // namespace

RunWatch::RunWatch(comm::Communicator world, std::string folder, double seconds, Told on_hang)
    : world_(std::move(world)),
      path_(fmt::format("{}/flight/rank-{:05d}.txt", folder, world_.rank())),
      on_hang_(std::move(on_hang)),
      answered_(report_request_count()) {
  std::error_code ignored;  // a folder that cannot be made shows in `write`
  std::filesystem::create_directories(folder + "/flight", ignored);
  if (seconds > 0.0) {
    comm::WatchdogOptions options;
    options.patience = std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000.0) + 1);
    options.on_hang = [this, seconds](const std::string& report) {
      tell(fmt::format("a call is pending for more than {} s", seconds), report);
    };
    watchdog_ = std::make_unique<comm::Watchdog>(world_, std::move(options));
  }
  requests_ = std::thread([this] { watch_requests(); });
}

RunWatch::~RunWatch() {
  watchdog_.reset();
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  requests_.join();
}

void RunWatch::watch_requests() {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kRequestPeriod, [this] { return stop_; })) {
    const int asked = report_request_count();
    if (asked == answered_) continue;
    answered_ = asked;
    lock.unlock();
    tell("asked for", world_.report());
    lock.lock();
  }
}

void RunWatch::tell(const std::string& reason, const std::string& report) noexcept {
  write(reason);
  if (!on_hang_) return;
  try {
    on_hang_(report);
  } catch (...) {  // a report that can't be shown must not end the run
  }
}

void RunWatch::write(const std::string& reason) noexcept {
  try {
    const std::string text = fmt::format(
        "== {:%Y-%m-%dT%H:%M:%S}Z: {}\n{}all calls kept, oldest first:\n{}\n",
        fmt::gmtime(std::chrono::system_clock::to_time_t(std::chrono::system_clock::now())), reason,
        world_.report(), world_.recorder().to_text());
    const std::lock_guard lock(file_mutex_);
    std::ofstream(path_, std::ios::binary | std::ios::app) << text << std::flush;
  } catch (...) {  // see the header
  }
}

}  // namespace meshloom::train::detail
