#pragma once

namespace meshloom::train::detail {

/// Calls of Trainer::request_stop and Trainer::request_report so far in this process: what a signal
/// handler can leave behind.
[[nodiscard]] int stop_request_count() noexcept;
[[nodiscard]] int report_request_count() noexcept;

}  // namespace meshloom::train::detail
