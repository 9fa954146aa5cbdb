#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "comm/internal/request.h"

namespace meshloom::comm::detail {

/// A block of bytes for or from one peer.
struct Block {
  int peer = 0;
  std::byte* data = nullptr;
  std::int64_t bytes = 0;
};

/// Messages that are posted together; when all have ended, `finish` runs (it may be empty).
/// Collectives leave zero-byte blocks out on both sides (but in a barrier).
struct Phase {
  std::vector<Block> sends;
  std::vector<Block> receives;
  std::function<void()> finish;
};

/// A call as phases of point-to-point messages, for backends that only move bytes. The k-th message
/// from a to b in a's schedule is the k-th from a in b's. Reductions run locally, in rank order, so
/// they are bit-identical on all ranks, backends and runs.
struct Schedule {
  std::vector<Phase> phases;
  std::vector<at::Tensor> scratch;
};

struct ScheduleLimits {
  /// Reductions exchange at most this much with one peer in a phase; bounds the scratch memory.
  std::int64_t piece_bytes = 1 << 20;
  /// Tensors up to this size are reduced whole by every rank: one phase instead of two.
  std::int64_t small_bytes = 16 << 10;
  /// Everything in one phase, whatever the size, for transports that can't be polled.
  bool single_phase = false;
};

/// @param request  a validated call of `rank`; its tensors must outlive the schedule. Local copies
///                 (a rank's own block) happen here. CPU tensors only. A send_receive is one
///                 phase with all its messages, empty ones and those to itself included.
[[nodiscard]] Schedule make_schedule(const Request& request, int rank, int size,
                                     const ScheduleLimits& limits);

}  // namespace meshloom::comm::detail
