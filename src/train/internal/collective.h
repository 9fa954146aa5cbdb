#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/error.h"

namespace meshloom::train::detail {

/// One rank's failure between collectives, as its peers learn of it.
struct LocalFailure {
  ErrorCode code = ErrorCode::kIo;
  std::string message;
};

/// The failure that is being handled; call inside a catch block.
[[nodiscard]] LocalFailure current_failure();

/// Every rank's text, in rank order, on every rank. Collective.
[[nodiscard]] std::vector<std::string> gather_text(comm::Communicator& group,
                                                   const std::string& text);

/// Root's text on every rank. Collective.
[[nodiscard]] std::string broadcast_text(comm::Communicator& group, const std::string& text,
                                         int root);

/// Every rank's numbers, [size()][values.size()], on every rank. Collective.
[[nodiscard]] std::vector<std::vector<double>> gather_numbers(comm::Communicator& group,
                                                              const std::vector<double>& values);

/// The first failure by rank, on every rank; nothing where no rank failed. The group stays usable.
/// Collective.
[[nodiscard]] std::optional<LocalFailure> first_failure(comm::Communicator& group,
                                                        const std::optional<LocalFailure>& own);

/// Throws the first failure on every rank, so that all end with the same error. Collective.
void agree(comm::Communicator& group, const char* where, const std::optional<LocalFailure>& own);

}  // namespace meshloom::train::detail
