#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "parallel/internal/host_tier.h"
#include "parallel/internal/spill_file.h"

namespace meshloom::parallel::detail {
namespace {

using Clock = std::chrono::steady_clock;

/// Of one copy: a disk that is slower hangs.
constexpr std::chrono::minutes kCopyLimit{10};

/// Where a tensor is. The copying thread takes it on from kQueued, kCopied and kFetched; the
/// owner's thread takes it back from kQueued and kCopied, and asks for it in kAway.
enum class Place : std::uint8_t {
  kQueued,   ///< whole, to be copied out
  kLeaving,  ///< being copied out, or its pages being freed
  kCopied,   ///< whole, with a copy in the file: somebody else still uses the tensor
  kAway,     ///< its pages are free
  kFetched,  ///< to be read, or being read
  kHome,     ///< whole, no copy in the file
};

class SpillTier;

/// Whole pages [begin, begin + bytes) of a tensor's memory, and their place in the file.
struct SpilledTensor final : HostedTensor {
  explicit SpilledTensor(SpillTier& owner) : tier(owner) {}
  ~SpilledTensor() override;

  SpillTier& tier;
  at::Tensor tensor;
  char* begin = nullptr;
  std::int64_t bytes = 0;
  // The rest under the tier's mutex.
  Place place = Place::kQueued;
  bool wanted = false;  ///< back, while it is leaving
  std::int64_t offset = -1;

  /// Nobody but this can reach the memory, so nobody will.
  [[nodiscard]] bool exclusive() const {
    return tensor.use_count() == 1 && tensor.storage().use_count() == 1;
  }
};

class SpillTier final : public HostTier {
 public:
  explicit SpillTier(const std::string& folder)
      : page_(::sysconf(_SC_PAGESIZE)), file_(folder), copier_([this] { run(); }) {}

  ~SpillTier() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_one();
    copier_.join();
    leaving_.clear();
    fetched_.clear();
    copied_.clear();
  }

  std::shared_ptr<HostedTensor> leave(at::Tensor& tensor, double ratio) override {
    const auto elements = static_cast<std::int64_t>(ratio * static_cast<double>(tensor.numel()));
    auto* const first = static_cast<char*>(tensor.data_ptr());
    const auto address = reinterpret_cast<std::intptr_t>(first);
    const std::intptr_t begin = (address + page_ - 1) / page_ * page_;
    const std::intptr_t end =
        (address + elements * static_cast<std::intptr_t>(tensor.element_size())) / page_ * page_;
    if (begin >= end) return nullptr;
    auto hosted = std::make_shared<SpilledTensor>(*this);
    hosted->tensor = std::move(tensor);
    hosted->begin = first + (begin - address);
    hosted->bytes = end - begin;
    {
      const std::lock_guard lock(mutex_);
      leaving_.push_back(hosted);
    }
    work_.notify_one();
    return hosted;
  }

  void settle(HostedTensor& hosted) override {
    auto& own = static_cast<SpilledTensor&>(hosted);
    wait([&] {
      return own.place != Place::kQueued && own.place != Place::kLeaving &&
             !(own.place == Place::kCopied && own.exclusive());
    });
  }

  void fetch(HostedTensor& hosted) override {
    auto& own = static_cast<SpilledTensor&>(hosted);
    const std::lock_guard lock(mutex_);
    switch (own.place) {
      case Place::kLeaving:
        own.wanted = true;
        break;
      case Place::kQueued:
      case Place::kCopied:
        come_home(own);
        break;
      case Place::kAway:
        call_back(own);
        work_.notify_one();
        break;
      case Place::kFetched:
      case Place::kHome:
        break;
    }
  }

  at::Tensor take(HostedTensor& hosted) override {
    auto& own = static_cast<SpilledTensor&>(hosted);
    fetch(hosted);
    wait([&] { return own.place == Place::kHome; });
    return own.tensor;
  }

  OffloadOutcome totals() const override {
    const std::lock_guard lock(mutex_);
    return totals_;
  }

  void reset() override {
    const std::lock_guard lock(mutex_);
    totals_ = {};
  }

  void set_spans(SpanSink spans) override { spans_ = std::move(spans); }

  void forget(SpilledTensor& hosted) {
    const std::lock_guard lock(mutex_);
    set_away(hosted, 0);
    come_home(hosted);
  }

 private:
  using SpilledPtr = std::shared_ptr<SpilledTensor>;
  using Lock = std::unique_lock<std::mutex>;

  /// Blocks the owner's thread until `there` holds. @throws what the copying thread met
  template <class Condition>
  void wait(const Condition& there) {
    Lock lock(mutex_);
    const auto over = [&] { return failure_ != nullptr || there(); };
    if (!over()) {
      sweep_ = true;
      work_.notify_one();
      const auto begin = Clock::now();
      const bool done = moved_.wait_for(lock, kCopyLimit, over);
      const auto end = Clock::now();
      totals_.exposed_seconds += std::chrono::duration<double>(end - begin).count();
      if (spans_) spans_(Span::Kind::kOffload, begin, end);
      if (!done) {
        throw Timeout("parallel.offload",
                      fmt::format("a copy between activations and the file for them took longer "
                                  "than {} minutes",
                                  kCopyLimit.count()));
      }
    }
    if (failure_) std::rethrow_exception(failure_);
  }

  void come_home(SpilledTensor& hosted) {
    if (hosted.offset >= 0) file_.release(std::exchange(hosted.offset, -1), hosted.bytes);
    hosted.place = Place::kHome;
  }

  void call_back(SpilledTensor& hosted) {
    hosted.place = Place::kFetched;
    set_away(hosted, 0);
    fetched_.push_back(std::static_pointer_cast<SpilledTensor>(hosted.shared_from_this()));
  }

  void run() {
    Lock lock(mutex_);
    while (true) {
      work_.wait(lock, [&] { return stop_ || sweep_ || !fetched_.empty() || !leaving_.empty(); });
      if (stop_) return;
      sweep_ = false;
      std::vector<SpilledPtr> through;  // let go of without the lock, which their ends may take
      try {
        if (!fetched_.empty()) {
          through.push_back(std::move(fetched_.front()));
          fetched_.pop_front();
          read(*through.back(), lock);
        } else if (!leaving_.empty()) {
          through.push_back(std::move(leaving_.front()));
          leaving_.pop_front();
          if (through.back()->place == Place::kQueued) write(through.back(), lock);
        }
        free_copied(through, lock);
      } catch (const std::exception&) {
        failure_ = std::current_exception();
      }
      lock.unlock();
      moved_.notify_all();
      through.clear();
      lock.lock();
    }
  }

  /// Runs `copy` without the lock.
  template <class Copy>
  static void timed(CopyTotals& totals, std::int64_t bytes, Lock& lock, const Copy& copy) {
    lock.unlock();
    const auto begin = Clock::now();
    try {
      copy();
    } catch (...) {
      lock.lock();
      throw;
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    lock.lock();
    totals.bytes += bytes;
    totals.seconds += seconds;
  }

  void write(const SpilledPtr& hosted, Lock& lock) {
    hosted->place = Place::kLeaving;
    hosted->offset = file_.allocate(hosted->bytes);
    timed(totals_.out, hosted->bytes, lock,
          [&] { file_.write(hosted->begin, hosted->bytes, hosted->offset); });
    if (std::exchange(hosted->wanted, false)) {
      come_home(*hosted);
    } else {
      hosted->place = Place::kCopied;
      copied_.push_back(hosted);
    }
  }

  static void free_pages(const SpilledTensor& hosted) {
    const auto size = static_cast<std::size_t>(hosted.bytes);
    if (::madvise(hosted.begin, size, MADV_DONTNEED) == 0) return;
    throw IoError("parallel.offload", fmt::format("cannot free {} bytes of activations: {}",
                                                  hosted.bytes, std::strerror(errno)));
  }

  void read(SpilledTensor& hosted, Lock& lock) {
    timed(totals_.back, hosted.bytes, lock,
          [&] { file_.read(hosted.begin, hosted.bytes, hosted.offset); });
    come_home(hosted);
  }

  /// Frees the pages of what is in the file and nobody uses any more.
  void free_copied(std::vector<SpilledPtr>& through, Lock& lock) {
    const std::vector<SpilledPtr> copied = std::exchange(copied_, {});
    through.insert(through.end(), copied.begin(), copied.end());
    for (const SpilledPtr& hosted : copied) {
      if (hosted->place != Place::kCopied) continue;
      if (!hosted->exclusive()) {
        copied_.push_back(hosted);
      } else {
        hosted->place = Place::kLeaving;
        timed(totals_.out, 0, lock, [&] { free_pages(*hosted); });
        hosted->place = Place::kAway;
        set_away(*hosted, hosted->bytes);
        if (std::exchange(hosted->wanted, false)) call_back(*hosted);
      }
    }
  }

  const std::intptr_t page_;
  mutable std::mutex mutex_;
  std::condition_variable work_;   ///< for the copying thread
  std::condition_variable moved_;  ///< for the owner's
  SpillFile file_;
  std::deque<SpilledPtr> leaving_;
  std::deque<SpilledPtr> fetched_;  ///< before what leaves: computation waits for it
  std::vector<SpilledPtr> copied_;
  OffloadOutcome totals_;
  SpanSink spans_;
  std::exception_ptr failure_;
  bool sweep_ = false;  ///< somebody waits for pages that may have become free
  bool stop_ = false;
  std::thread copier_;  ///< last: all else is there when it starts
};

SpilledTensor::~SpilledTensor() { tier.forget(*this); }

}  // namespace

HostedTensor::~HostedTensor() = default;
HostTier::~HostTier() = default;

std::unique_ptr<HostTier> make_spill_tier(const std::string& folder) {
  return std::make_unique<SpillTier>(folder);
}

}  // namespace meshloom::parallel::detail
