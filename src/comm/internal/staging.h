#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "comm/internal/request.h"

namespace meshloom::comm::detail {

/// A call on device tensors over a backend that moves host memory: the backend gets host copies,
/// and what it wrote goes to the device when the call is waited for. Not thread safe.
class Staging {
 public:
  /// Replaces the tensors of `request` that are not on the host by host copies, of what is read
  /// with its contents: waits until the device has written that. nullopt where all are on the host.
  [[nodiscard]] static std::optional<Staging> begin(Request& request);

  /// Copies what was written to the device; at most once.
  void finish();

  /// The result on the device, of calls that have one: defined from the start, filled by `finish`.
  [[nodiscard]] const at::Tensor& output() const { return output_; }

 private:
  struct Copy {
    at::Tensor device;
    at::Tensor host;
  };

  /// A host tensor like `device`; with its contents where `reads`, delivered to it where `writes`.
  at::Tensor stage(const at::Tensor& device, bool reads, bool writes);

  std::vector<Copy> read_;  ///< one tensor may be sent to many peers
  std::vector<Copy> written_;
  at::Tensor output_;
};

}  // namespace meshloom::comm::detail
