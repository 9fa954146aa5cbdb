#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <exception>
#include <mutex>
#include <thread>

#include "comm/backends/thread/thread_hub.h"
#include "comm/internal/group.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/check.h"

namespace meshloom::comm {
namespace detail {
namespace {

class ThreadGroup final : public GroupImpl {
 public:
  ThreadGroup(GroupInfo info, std::shared_ptr<ThreadHub> hub)
      : GroupImpl(std::move(info)), hub_(std::move(hub)) {}

  [[nodiscard]] std::string backend() const override { return "thread"; }

  void start(const std::shared_ptr<WorkImpl>& work) override {
    if (work->request().operation == Operation::kSendReceive) {
      hub_->post_exchange(info().rank, work);
    } else {
      hub_->post_collective(info().rank, work);
    }
  }

  void abort(const std::string& reason) noexcept override { hub_->abort(reason); }

  [[nodiscard]] std::string abort_reason() override { return hub_->abort_reason(); }

  [[nodiscard]] std::vector<int> missing(const WorkImpl& work) override {
    return hub_->missing(info().rank, work);
  }

  [[nodiscard]] std::shared_ptr<GroupImpl> make_child(
      const std::optional<SplitPlace>& place) override {
    if (!place) return nullptr;
    const int size = static_cast<int>(place->members.size());
    return std::make_shared<ThreadGroup>(child_info(info(), place->name, place->rank, size),
                                         hub_->child(place->number, place->color, size));
  }

 private:
  std::shared_ptr<ThreadHub> hub_;
};

// The first failure by rank that is the rank's own: CommError may only echo another rank's abort.
std::exception_ptr original_failure(const std::vector<std::exception_ptr>& failures,
                                    const std::exception_ptr& earliest) {
  for (const auto& failure : failures) {
    if (!failure) continue;
    try {
      std::rethrow_exception(failure);
    } catch (const CommError&) {
    } catch (...) {
      return failure;
    }
  }
  return earliest;
}

std::string text_of(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "unknown exception";
  }
}

}  // namespace
}  // namespace detail

std::vector<Communicator> make_thread_world(int size, const GroupOptions& options) {
  std::vector<Communicator> result;
  MESHLOOM_CHECK_GE(size, 1, "comm.make_thread_world", "size");
  const auto hub = std::make_shared<detail::ThreadHub>(size);
  for (int rank = 0; rank < size; ++rank) {
    auto info = detail::make_info(options, rank, size);
    info.deterministic = true;
    result.emplace_back(std::make_shared<detail::ThreadGroup>(std::move(info), hub));
  }
  return result;
}

void run_thread_ranks(int size, const std::function<void(Communicator)>& body,
                      const GroupOptions& options, int threads_per_rank) {
  MESHLOOM_CHECK_GE(threads_per_rank, 1, "comm.run_thread_ranks", "threads_per_rank");
  auto world = make_thread_world(size, options);
  const int threads_before = at::get_num_threads();
  std::mutex mutex;
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(size));
  std::exception_ptr earliest;
  std::vector<std::thread> threads;
  const auto run = [&](int rank) {
    try {
      // Thread local where it counts (OpenMP and MKL), so ranks do not share one setting.
      at::set_num_threads(threads_per_rank);
      body(world[rank]);
    } catch (...) {
      const auto failure = std::current_exception();
      {
        const std::lock_guard lock(mutex);
        failures[rank] = failure;
        if (!earliest) earliest = failure;
      }
      world[rank].abort(fmt::format("rank {} failed: {}", rank, detail::text_of(failure)));
    }
  };
  try {
    for (int rank = 0; rank < size; ++rank) threads.emplace_back(run, rank);
  } catch (...) {  // no more threads: those that run must not wait for those that never will
    world[0].abort("a rank's thread could not be started");
    for (auto& thread : threads) thread.join();
    at::set_num_threads(threads_before);
    throw;
  }
  for (auto& thread : threads) thread.join();
  at::set_num_threads(threads_before);
  if (earliest) std::rethrow_exception(detail::original_failure(failures, earliest));
}

}  // namespace meshloom::comm
