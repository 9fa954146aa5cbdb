#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "meshloom/parallel/activation_offload.h"

namespace meshloom::parallel::detail {

/// A saved tensor whose first part is in host memory, or on its way there or back.
class HostedTensor : public std::enable_shared_from_this<HostedTensor> {
 public:
  virtual ~HostedTensor();
  /// Bytes of the device that are free for it; from `fetch` on they count as used.
  [[nodiscard]] std::int64_t away_bytes() const { return away_; }

 private:
  friend class HostTier;
  std::atomic<std::int64_t> away_{0};
};

/// Host memory behind a device, and the copies there and back. One thread calls it.
class HostTier {
 public:
  virtual ~HostTier();

  /// Begins to copy the first `ratio` of `tensor`'s elements out.
  /// @param tensor  contiguous; moved from, unless too little of it would move
  /// @returns null where nothing moves
  [[nodiscard]] virtual std::shared_ptr<HostedTensor> leave(at::Tensor& tensor, double ratio) = 0;
  /// Waits until the copy out is over: what it took on the device is free, unless somebody else
  /// still uses the tensor; then as soon as he does not.
  virtual void settle(HostedTensor& hosted) = 0;
  /// Begins to bring it back, or calls it off where it has not gone; may be called again.
  virtual void fetch(HostedTensor& hosted) = 0;
  /// The tensor, once it is there; the same for every call.
  [[nodiscard]] virtual at::Tensor take(HostedTensor& hosted) = 0;

  /// Of all tensors.
  [[nodiscard]] std::int64_t away_bytes() const { return away_; }
  /// Copies and waits since `reset`.
  [[nodiscard]] virtual OffloadOutcome totals() const = 0;
  virtual void reset() = 0;
  /// Gets what the host waits.
  virtual void set_spans(SpanSink spans) = 0;

 protected:
  void set_away(HostedTensor& hosted, std::int64_t bytes) {
    away_ += bytes - hosted.away_.exchange(bytes);
  }

 private:
  std::atomic<std::int64_t> away_{0};
};

/// For tensors in CPU memory: a file, and a thread that copies. The tensors keep their addresses;
/// whole pages of them are given back to the system and filled again.
[[nodiscard]] std::unique_ptr<HostTier> make_spill_tier(const std::string& folder);

/// For tensors on an accelerator: pinned memory, and a stream that copies. Waiting is the device's:
/// no call blocks the host.
[[nodiscard]] std::unique_ptr<HostTier> make_stream_tier(at::Device device);

}  // namespace meshloom::parallel::detail
