#include "train/internal/traffic_meter.h"

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>

namespace meshloom::train::detail {

namespace {

/// Bytes by peer, a rank of the world.
std::map<int, std::int64_t> by_peer(const comm::TrafficEntry& now, const comm::TrafficEntry& before,
                                    const std::vector<int>& ranks, int own) {
  std::map<int, std::int64_t> result;
  std::int64_t rest = now.sent_bytes - before.sent_bytes;
  for (const auto& [peer, bytes] : now.sent_to) {
    const auto found = before.sent_to.find(peer);
    const std::int64_t sent = bytes - (found == before.sent_to.end() ? 0 : found->second);
    if (sent == 0) continue;
    result[ranks.at(static_cast<std::size_t>(peer))] += sent;
    rest -= sent;
  }
  auto others = static_cast<std::int64_t>(ranks.size()) - 1;
  for (const int rank : ranks) {
    if (rank == own || rest <= 0) continue;
    const std::int64_t part = rest / others--;
    if (part > 0) result[rank] += part;
    rest -= part;
  }
  return result;
}

}  // namespace

TrafficMeter::TrafficMeter(comm::Communicator world, std::vector<int> host_of)
    : world_(std::move(world)), host_of_(std::move(host_of)) {}

RankTraffic TrafficMeter::take() {
  RankTraffic result;
  const int own = world_.rank();
  const int host = host_of_.at(static_cast<std::size_t>(own));
  for (comm::GroupTraffic& group : world_.traffic_by_group()) {
    comm::Traffic& seen = seen_[{group.group, group.ranks}];
    for (const auto& [kind, now] : group.traffic) {
      const comm::TrafficEntry& before = seen[kind];
      KindTraffic& sum = result.kinds[kind];
      sum.seconds += now.seconds - before.seconds;
      sum.exposed_seconds += now.exposed_seconds - before.exposed_seconds;
      for (const auto& [peer, bytes] : by_peer(now, before, group.ranks, own)) {
        (host_of_.at(static_cast<std::size_t>(peer)) == host ? sum.inside_bytes
                                                             : sum.between_bytes) += bytes;
        sent_[kind][peer] += bytes;
        by_group_[group.group][kind] += bytes;
        result.groups[group.group] += bytes;
      }
    }
    seen = std::move(group.traffic);
  }
  return result;
}

std::string TrafficMeter::totals_json() const {
  auto sent = nlohmann::ordered_json::object();
  for (const auto& [kind, peers] : sent_) {
    auto& row = sent[kind] = nlohmann::ordered_json::object();
    for (const auto& [peer, bytes] : peers) row[std::to_string(peer)] = bytes;
  }
  return nlohmann::ordered_json{{"sent", std::move(sent)}, {"groups", by_group_}}.dump();
}

}  // namespace meshloom::train::detail
