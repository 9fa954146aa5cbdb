#pragma once

#include <chrono>
#include <memory>
#include <optional>

#include "meshloom/core/export.h"

namespace at {
class Tensor;
}

namespace meshloom::comm {

namespace detail {
class WorkImpl;
}

/// Handle of one started operation; copies share it. Any thread may poll or wait. Tensors that the
/// operation reads or writes are kept alive until it ends, and must not be touched before.
/// Dropping the last handle of an unfinished operation does not wait and does not cancel it.
class MESHLOOM_API Work {
 public:
  Work();  ///< an operation that is already complete and has no result
  explicit Work(std::shared_ptr<detail::WorkImpl> impl);

  /// True once the operation ended, well or badly. Never blocks, never throws.
  [[nodiscard]] bool done() const noexcept;

  /// Blocks until the operation ends. Without a limit, the one the operation was started with
  /// (options, then group, then environment) counts from its start.
  /// @throws Timeout    names operation, group, rank and limit; the group is aborted.
  /// @throws CommError  transport failed or the group was aborted; the group is unusable.
  void wait(std::optional<std::chrono::milliseconds> limit = std::nullopt);

  /// `wait()`, then the output of the operations that return one (all_gather, reduce_scatter,
  /// all_to_all, receive). @throws InvalidArgument  the operation has no output.
  [[nodiscard]] at::Tensor result(std::optional<std::chrono::milliseconds> limit = std::nullopt);

 private:
  std::shared_ptr<detail::WorkImpl> impl_;
};

}  // namespace meshloom::comm
