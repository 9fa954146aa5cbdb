#include "meshloom/comm/work.h"

#include <fmt/format.h>

#include <utility>

#include "comm/internal/group.h"
#include "comm/internal/work_impl.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace detail {

WorkImpl::WorkImpl(const std::shared_ptr<GroupImpl>& group, Request request,
                   std::optional<Staging> staging, std::string purpose,
                   std::chrono::milliseconds limit, std::int64_t record)
    : group_(group),
      recorder_(group->info().recorder),
      account_(group->account),
      record_(record),
      rank_(group->info().rank),
      size_(group->info().size),
      group_name_(group->info().name),
      doing_(recorder_->doing()),
      request_(std::move(request)),
      staging_(std::move(staging)),
      purpose_(std::move(purpose)),
      start_(std::chrono::steady_clock::now()),
      limit_(limit) {}

std::string WorkImpl::where() const { return std::string("comm.") + name_of(request_.operation); }

std::string WorkImpl::who() const {
  return fmt::format("rank {}/{} group \"{}\" (purpose {}, call {}{}{})", rank_, size_, group_name_,
                     purpose_, request_.sequence, doing_->empty() ? "" : ", in ", *doing_);
}

double WorkImpl::age_seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

bool WorkImpl::end(std::exception_ptr error) {
  const bool ok = error == nullptr;
  {
    Request released;  // freed outside the lock
    const std::lock_guard lock(mutex_);
    if (ending_) return false;
    ending_ = true;
    if (ok) {
      released.input = std::move(request_.input);
      released.sends = std::move(request_.sends);
      released.receives = std::move(request_.receives);
      if (!has_output()) released.output = std::move(request_.output);
    }
  }
  {
    const std::lock_guard lock(account_->mutex);
    account_->traffic[purpose_].seconds += age_seconds();
  }
  const std::lock_guard lock(mutex_);
  error_ = std::move(error);
  helper_ = nullptr;
  recorder_->end(record_, ok);
  done_.store(true, std::memory_order_release);
  // Under the lock: once the lock is free a waiter may return and the call's owner may go away.
  changed_.notify_all();
  return true;
}

bool WorkImpl::has_output() const {
  return request_.operation == Operation::kAllGather ||
         request_.operation == Operation::kReduceScatter ||
         request_.operation == Operation::kAllToAll;
}

void WorkImpl::complete() { end(nullptr); }

void WorkImpl::fail(const std::string& text) {
  if (!done()) end(std::make_exception_ptr(CommError(where(), who() + ": " + text)));
}

void WorkImpl::offer(std::function<void()> helper) {
  const std::lock_guard lock(mutex_);
  if (done()) return;
  helper_ = std::move(helper);
  changed_.notify_one();
}

void WorkImpl::wait(std::optional<std::chrono::milliseconds> limit) {
  const auto until = limit ? std::chrono::steady_clock::now() + *limit : deadline();
  if (!done()) {
    const auto begin = std::chrono::steady_clock::now();
    const auto group = group_.lock();
    if (group) group->waiting(+1);
    wait_until(until, limit.value_or(limit_));
    if (group) group->waiting(-1);
    const std::chrono::duration<double> blocked = std::chrono::steady_clock::now() - begin;
    const std::lock_guard lock(account_->mutex);
    account_->traffic[purpose_].exposed_seconds += blocked.count();
  }
  const std::lock_guard lock(mutex_);
  if (error_) std::rethrow_exception(error_);
  if (staging_) staging_->finish();
}

void WorkImpl::wait_until(std::chrono::steady_clock::time_point until,
                          std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  while (!done()) {
    if (helper_) {
      const auto helper = std::exchange(helper_, nullptr);
      lock.unlock();
      helper();
      lock.lock();
    } else if (changed_.wait_until(lock, until) == std::cv_status::timeout && !done() && !helper_) {
      lock.unlock();
      expire(limit);
      lock.lock();
    }
  }
}

void WorkImpl::expire(std::chrono::milliseconds limit) {
  const auto group = group_.lock();
  std::string missing = "unknown (the group is gone)";
  if (group) {
    missing = group->missing_peers(*this);
    // A peer that timed out first has aborted the group, and with it what was known of who is
    // there.
    if (const std::string reason = group->abort_reason(); missing.empty() && !reason.empty()) {
      fail("aborted: " + reason);
      return;
    }
  }
  if (missing.empty()) missing = "unknown";
  const std::string text = fmt::format("{}: not finished within {:.3f} s; missing peers: {}", who(),
                                       static_cast<double>(limit.count()) / 1000.0, missing);
  if (!end(std::make_exception_ptr(Timeout(where(), text)))) return;
  if (group) group->abort(fmt::format("rank {} timed out in {}: {}", rank_, where(), text));
}

at::Tensor WorkImpl::output() const {
  if (!has_output()) throw InvalidArgument(where(), who() + ": the operation has no output");
  return alias_of(staging_ ? staging_->output() : request_.output);
}

}  // namespace detail

Work::Work() = default;

Work::Work(std::shared_ptr<detail::WorkImpl> impl) : impl_(std::move(impl)) {}

bool Work::done() const noexcept { return !impl_ || impl_->done(); }

void Work::wait(std::optional<std::chrono::milliseconds> limit) {
  if (impl_) impl_->wait(limit);
}

at::Tensor Work::result(std::optional<std::chrono::milliseconds> limit) {
  if (!impl_) throw InvalidArgument("comm.work", "an empty Work has no output");
  auto output = impl_->output();
  impl_->wait(limit);
  return output;
}

}  // namespace meshloom::comm
