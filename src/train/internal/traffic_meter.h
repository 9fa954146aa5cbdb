#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/train/trainer.h"

namespace meshloom::train::detail {

/// What one rank sent in some stretch of time.
struct RankTraffic {
  std::map<std::string, KindTraffic> kinds;
  std::map<std::string, std::int64_t> groups;  ///< bytes by group name
};

/// Reads one rank's accounts (comm::Communicator::traffic_by_group) step by step and tells who is
/// on the same host. Bytes of collectives, which name no peer, count as sent to all others of the
/// group in equal parts. Not thread safe.
class TrafficMeter {
 public:
  /// @param host_of  a number for the host of every rank of the world
  TrafficMeter(comm::Communicator world, std::vector<int> host_of);

  /// What was moved since the last call (or construction), which is also added to the totals.
  RankTraffic take();

  /// The totals as a JSON object: `sent`: bytes by kind and peer, `groups`: bytes by group and
  /// kind.
  [[nodiscard]] std::string totals_json() const;

 private:
  comm::Communicator world_;
  std::vector<int> host_of_;
  std::map<std::pair<std::string, std::vector<int>>, comm::Traffic> seen_;
  std::map<std::string, std::map<int, std::int64_t>> sent_;              // by kind, peer
  std::map<std::string, std::map<std::string, std::int64_t>> by_group_;  // by group, kind
};

}  // namespace meshloom::train::detail
