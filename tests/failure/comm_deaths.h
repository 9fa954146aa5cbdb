#pragma once

#include <string>

#include "meshloom/comm/communicator.h"

/// Ways in which a job breaks, as bodies that every rank runs. One line a rank goes to stdout:
/// 'rank R pid P ends|stops|waits|ok' or 'rank R after S s: <the error>'.
namespace meshloom::comm::deaths {

/// @param mode  killed_in_collective, killed_in_exchange, killed_in_split, stopped, absent, shapes
///              or kinds; the last rank but one is the one that breaks.
/// @returns the exit code: 3 for an error as it should be, 0 for a rank that saw none.
int run(Communicator& comm, const std::string& mode);

}  // namespace meshloom::comm::deaths
