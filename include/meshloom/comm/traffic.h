#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace meshloom::comm {

/// Bytes and messages under one purpose.
struct TrafficEntry {
  std::int64_t calls = 0;
  std::int64_t sent_bytes = 0;      ///< payload this rank handed to other ranks (self excluded)
  std::int64_t received_bytes = 0;  ///< payload it got from other ranks
  std::map<int, std::int64_t>
      sent_to;  ///< by peer (group rank), point-to-point and all_to_all only
  /// Time that calls which ended, well or badly, were under way: from the call to its end, waiting
  /// for late peers included, summed over calls that overlap.
  double seconds = 0.0;
  double exposed_seconds = 0.0;  ///< time that threads of this rank were blocked in Work::wait
};

/// By purpose (CallOptions::purpose). For collectives without a peer the payload is what any
/// bandwidth-optimal algorithm must move, with n ranks: all_gather sends the own rows n-1 times and
/// receives the others' rows, reduce_scatter the reverse, all_reduce 2 (n-1)/n of the tensor each
/// way, broadcast the tensor once per receiver at the root.
using Traffic = std::map<std::string, TrafficEntry>;

/// One group's account as one of its ranks keeps it.
struct GroupTraffic {
  std::string group;
  std::vector<int> ranks;  ///< of the world, by group rank
  Traffic traffic;
};

}  // namespace meshloom::comm
