#pragma once

#include <cstdint>

namespace meshloom::comm::detail {

/// @throws CommError  with MPI's own text, unless `code` is MPI_SUCCESS.
void check_mpi(int code, const char* call);

/// Larger blocks are cut, since MPI-3 counts are ints.
inline constexpr std::int64_t kMessageBytes = std::int64_t{1} << 30;

}  // namespace meshloom::comm::detail
