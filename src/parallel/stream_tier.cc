#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "parallel/internal/host_tier.h"

namespace meshloom::parallel::detail {
namespace {

/// Smaller copies cost more to start than they take.
constexpr std::int64_t kLeastBytes = 4096;

/// Two moments of a stream, between which time is taken.
struct Interval {
  explicit Interval(at::Device device)
      : begin(device.type(), c10::EventFlag::BACKEND_DEFAULT),
        end(device.type(), c10::EventFlag::BACKEND_DEFAULT) {}
  c10::Event begin;
  c10::Event end;

  [[nodiscard]] double seconds() const {
    end.synchronize();
    return begin.elapsedTime(end) / 1e3;
  }
};

/// The first elements of a tensor are in `host`, the others in `rest`. All device memory belongs to
/// the computing stream, which waits for a copy before it lets go of what the copy used: so the
/// allocator may hand it on at once.
struct StreamedTensor final : HostedTensor {
  at::Tensor whole;  ///< undefined while it is away
  at::Tensor host;
  at::Tensor rest;
  at::TensorOptions options;
  std::vector<std::int64_t> sizes;
  std::optional<Interval> out;
  std::optional<Interval> back;
  bool settled = false;
  bool fetched = false;
};

class StreamTier final : public HostTier {
 public:
  explicit StreamTier(at::Device device)
      : device_(device), guard_(device.type()), copies_(guard_.getStreamFromGlobalPool(device)) {}

  std::shared_ptr<HostedTensor> leave(at::Tensor& tensor, double ratio) override {
    const std::int64_t total = tensor.numel();
    const auto part = static_cast<std::int64_t>(ratio * static_cast<double>(total));
    const std::int64_t bytes = part * static_cast<std::int64_t>(tensor.element_size());
    if (bytes < kLeastBytes) return nullptr;
    const c10::DeviceGuard at_device(device_);
    auto hosted = std::make_shared<StreamedTensor>();
    hosted->whole = std::move(tensor);
    hosted->options = hosted->whole.options();
    hosted->sizes = hosted->whole.sizes().vec();
    hosted->host = at::empty({part}, hosted->options.device(at::kCPU).pinned_memory(true));
    hosted->rest = at::empty({total - part}, hosted->options);
    const at::Tensor flat = hosted->whole.view({-1});
    copy(hosted->out.emplace(device_), [&] {
      hosted->host.copy_(flat.narrow(0, 0, part), /*non_blocking=*/true);
      hosted->rest.copy_(flat.narrow(0, part, total - part), /*non_blocking=*/true);
    });
    totals_.out.bytes += bytes;
    return hosted;
  }

  void settle(HostedTensor& hosted) override {
    auto& own = static_cast<StreamedTensor&>(hosted);
    if (std::exchange(own.settled, true)) return;
    wait_for(*own.out);
    own.whole.reset();
    set_away(own, static_cast<std::int64_t>(own.host.nbytes()));
  }

  void fetch(HostedTensor& hosted) override {
    auto& own = static_cast<StreamedTensor&>(hosted);
    if (std::exchange(own.fetched, true)) return;
    if (!std::exchange(own.settled, true)) {  // never left; its copy may still be reading
      wait_for(*own.out);
      return;
    }
    const c10::DeviceGuard at_device(device_);
    own.whole = at::empty(own.sizes, own.options);
    at::Tensor flat = own.whole.view({-1});
    const std::int64_t part = own.host.numel();
    copy(own.back.emplace(device_), [&] {
      flat.narrow(0, 0, part).copy_(own.host, /*non_blocking=*/true);
      flat.narrow(0, part, flat.numel() - part).copy_(own.rest, /*non_blocking=*/true);
    });
    totals_.back.bytes += static_cast<std::int64_t>(own.host.nbytes());
    set_away(own, 0);
  }

  at::Tensor take(HostedTensor& hosted) override {
    auto& own = static_cast<StreamedTensor&>(hosted);
    fetch(hosted);
    if (own.back) wait_for(*own.back);
    keep(own.out, out_);
    keep(own.back, back_);
    return own.whole;
  }

  OffloadOutcome totals() const override {
    OffloadOutcome result = totals_;
    for (const Interval& interval : out_) result.out.seconds += interval.seconds();
    for (const Interval& interval : back_) result.back.seconds += interval.seconds();
    for (const Interval& interval : waits_) result.exposed_seconds += interval.seconds();
    return result;
  }

  void reset() override {
    totals_ = {};
    out_.clear();
    back_.clear();
    waits_.clear();
  }

  void set_spans(SpanSink /*spans*/) override {}

 private:
  /// On the copying stream, behind all that computation was given so far.
  template <class Copies>
  void copy(Interval& interval, const Copies& copies) {
    c10::Event given(device_.type());
    given.record(guard_.getStream(device_));
    given.block(copies_);
    interval.begin.record(copies_);
    {
      const c10::StreamGuard on_copies(copies_);
      copies();
    }
    interval.end.record(copies_);
  }

  /// For the totals, beyond the tensor's life.
  static void keep(std::optional<Interval>& interval, std::vector<Interval>& kept) {
    if (interval) kept.push_back(std::move(*interval));
    interval.reset();
  }

  void wait_for(const Interval& interval) {
    const c10::Stream computing = guard_.getStream(device_);
    Interval& wait = waits_.emplace_back(device_);
    wait.begin.record(computing);
    interval.end.block(computing);
    wait.end.record(computing);
  }

  const at::Device device_;
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream copies_;
  OffloadOutcome totals_;
  std::vector<Interval> out_;
  std::vector<Interval> back_;
  std::vector<Interval> waits_;
};

}  // namespace

std::unique_ptr<HostTier> make_stream_tier(at::Device device) {
  return std::make_unique<StreamTier>(device);
}

}  // namespace meshloom::parallel::detail
