#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "meshloom/comm/communicator.h"
#include "meshloom/core/export.h"

namespace meshloom::parallel {

/// Half-open range of a flat parameter space, in elements.
struct FlatRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::int64_t size() const { return end - begin; }
};

/// What the rank at `position` of `count` owns of `elements`; sizes differ by at most one.
[[nodiscard]] MESHLOOM_API FlatRange owned_range(std::int64_t elements, int position, int count);

/// The order in which ranks own what they share, and how many nodes they span.
struct ReplicaOrder {
  std::vector<int> ranks;  ///< world ranks by position
  int nodes = 1;           ///< above 1: position = place inside the node * nodes + node
};

/// Ranks that fill two nodes or more in equal numbers, more than one each, are ordered by their
/// place inside a node, so that a node's sums fall into neighbouring ranges; others stay ascending.
/// @param ranks           world ranks, ascending
/// @param ranks_per_node  consecutive world ranks of a node; 0: all are in one
[[nodiscard]] MESHLOOM_API ReplicaOrder order_replicas(std::vector<int> ranks, int ranks_per_node);

namespace detail {
class ReplicaLane;
struct ReplicaCall;
}  // namespace detail

/// A sum or a gathering that is under way.
class MESHLOOM_API ReplicaWork {
 public:
  ReplicaWork(std::shared_ptr<detail::ReplicaLane> lane, std::shared_ptr<detail::ReplicaCall> call);

  /// Waits for the end.
  [[nodiscard]] at::Tensor result();

 private:
  std::shared_ptr<detail::ReplicaLane> lane_;
  std::shared_ptr<detail::ReplicaCall> call_;
};

/// The two groups of a rank among replicas that fill several nodes.
struct ReplicaLevels {
  comm::Communicator inside;  ///< the node's, by place in it
  comm::Communicator across;  ///< those with this place in their nodes, by node
};

/// The ranks that hold the same parameters, and how sums and copies travel among them: in one call,
/// or, where they fill several nodes, in one inside the nodes and one across them, so that a node's
/// network carries 1 / (its ranks) of what one call would send through it. A value handle, copies
/// share the order of calls.
///
/// Calls start an operation and don't block; all ranks make them in the same order. The second call
/// of an operation starts when the first has ended and somebody looks: `advance`, or `result`. Sums
/// and gatherings have groups of their own, since those seconds start at another time on each rank.
class MESHLOOM_API Replicas {
 public:
  explicit Replicas(comm::Communicator group);
  Replicas(ReplicaLevels sums, ReplicaLevels gatherings);

  [[nodiscard]] int size() const;
  /// Of this rank in the order of ownership.
  [[nodiscard]] int position() const;

  /// Sums a buffer, each rank keeping what it owns.
  /// @param flat  [elements], the same on all ranks; not modified
  /// @returns result(): [owned_range(elements, position(), size()).size()]
  [[nodiscard]] ReplicaWork reduce_scatter(const at::Tensor& flat);
  /// Puts together what all ranks own.
  /// @param shard     [owned_range(elements, position(), size()).size()]
  /// @param elements  in all
  /// @returns result(): [elements]
  [[nodiscard]] ReplicaWork all_gather(const at::Tensor& shard, std::int64_t elements);

  /// Starts what can start of operations under way. Never blocks.
  void advance();

  /// The groups that carry them.
  [[nodiscard]] std::vector<comm::Communicator> groups() const;

 private:
  [[nodiscard]] int nodes() const { return across_sums_ ? across_sums_->size() : 1; }
  /// Elements that each rank inside ends up with, its peers' across included.
  [[nodiscard]] std::vector<std::int64_t> inside_rows(std::int64_t elements) const;
  /// Elements that each rank across owns.
  [[nodiscard]] std::vector<std::int64_t> across_rows(std::int64_t elements) const;

  comm::Communicator inside_sums_;
  comm::Communicator inside_gatherings_;
  std::optional<comm::Communicator> across_sums_;
  std::optional<comm::Communicator> across_gatherings_;
  std::shared_ptr<detail::ReplicaLane> sums_;
  std::shared_ptr<detail::ReplicaLane> gatherings_;
};

}  // namespace meshloom::parallel
