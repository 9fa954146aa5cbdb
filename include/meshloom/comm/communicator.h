#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "meshloom/comm/flight_recorder.h"
#include "meshloom/comm/traffic.h"
#include "meshloom/comm/work.h"
#include "meshloom/core/export.h"

namespace at {
class Tensor;
}

namespace meshloom::comm {

namespace detail {
class GroupImpl;
struct Request;
}  // namespace detail

enum class ReduceOp : std::uint8_t { kSum, kMax, kMin };

/// Options of one call; every field has a default.
struct CallOptions {
  /// Limit of the wait; otherwise the group's, otherwise the environment's.
  std::optional<std::chrono::milliseconds> timeout;
  /// What the bytes are for, e.g. "exchange", "gradients": the key of the traffic account.
  const char* purpose = "other";
};

/// One piece of a grouped point-to-point call. `peer` is a rank of the group. Messages between two
/// ranks match in the order in which each side posted them (no tags).
struct Transfer {
  int peer = 0;
  const at::Tensor* tensor = nullptr;  ///< contiguous; read by sends, written in place by receives
};

/// A group of ranks and its traffic; a value handle, copies share the group.
///
/// Collective calls (all but send_receive, size, rank, name, traffic and abort) must be made by all
/// ranks in the same order; one thread of a rank at a time calls a group. Calls start the operation
/// and return; nothing blocks the host but `Work::wait`, `split` and `barrier().wait()`. A world of
/// one works with no special case. Tensors: contiguous, on this group's device type; fp64, fp32,
/// bf16, fp16, int64, int32, uint8. Zero sizes are allowed everywhere. Over a backend that moves
/// host memory a device's tensors are staged: starting a call waits until the device has written
/// what is read, and what was received is on the device once `Work::wait` has returned.
///
/// Errors: arguments that this rank can check alone throw InvalidArgument before anything is sent
/// and leave the group usable. CommError and Timeout come from Work, also for calls on a group that
/// is already aborted, and leave the group aborted.
class MESHLOOM_API Communicator {
 public:
  explicit Communicator(std::shared_ptr<detail::GroupImpl> impl);

  [[nodiscard]] int rank() const;
  [[nodiscard]] int size() const;
  [[nodiscard]] const std::string& name() const;
  [[nodiscard]] std::string backend() const;  ///< "thread", "mpi", "torch", "fake", "nccl"

  /// Element-wise reduction, in place, in rank order where `deterministic()` is true.
  [[nodiscard]] Work all_reduce_(at::Tensor& tensor, ReduceOp op = ReduceOp::kSum,
                                 const CallOptions& options = {});

  /// Every rank's rows, concatenated in rank order.
  /// @param input  [rows[rank()], ...], the same trailing shape and dtype on all ranks.
  /// @param rows   rows of each rank; size() entries; equal on all ranks.
  /// @returns result(): [sum(rows), ...]
  [[nodiscard]] Work all_gather(const at::Tensor& input, std::span<const std::int64_t> rows,
                                const CallOptions& options = {});

  /// Sum over ranks, of which this rank keeps its rows.
  /// @param input  [sum(rows), ...] on all ranks.
  /// @returns result(): [rows[rank()], ...]
  [[nodiscard]] Work reduce_scatter(const at::Tensor& input, std::span<const std::int64_t> rows,
                                    const CallOptions& options = {});

  /// Sends row blocks of `input` to all ranks of the group.
  /// @param input      [sum(send_rows), ...]; not modified.
  /// @param send_rows  rows for each destination; size() entries.
  /// @param recv_rows  rows from each source; recv_rows[r] here equals send_rows[rank()] there.
  /// @returns result(): [sum(recv_rows), ...] in source-rank order.
  [[nodiscard]] Work all_to_all(const at::Tensor& input, std::span<const std::int64_t> send_rows,
                                std::span<const std::int64_t> recv_rows,
                                const CallOptions& options = {});

  /// `tensor` of `root` to all, in place.
  [[nodiscard]] Work broadcast_(at::Tensor& tensor, int root, const CallOptions& options = {});

  [[nodiscard]] Work barrier(const CallOptions& options = {});

  /// A grouped batch of sends and receives that progress together and end together. Called by any
  /// subset of ranks; every send needs its receive. A rank may send to itself.
  [[nodiscard]] Work send_receive(std::span<const Transfer> sends,
                                  std::span<const Transfer> receives,
                                  const CallOptions& options = {});

  /// Groups by colour, ranks ordered by (key, rank); a negative colour gives no group. Collective;
  /// blocks. @returns nullopt for a negative colour.
  [[nodiscard]] std::optional<Communicator> split(int color, int key, const std::string& name);

  /// Bytes that this rank handed to the transport, by purpose and peer.
  [[nodiscard]] Traffic traffic() const;
  void reset_traffic();

  /// The accounts of all groups that are alive of the world that this group was split from, in the
  /// order of their making. Any thread.
  [[nodiscard]] std::vector<GroupTraffic> traffic_by_group() const;

  /// Fixed reduction order whatever the timing.
  [[nodiscard]] bool deterministic() const;

  /// Ends every pending and future call on this rank with CommError; never waits for peers. They
  /// are told where the backend can (thread, mpi). Groups split from this one are aborted too.
  void abort(const std::string& reason) noexcept;

  /// Why this group was aborted, here or by another rank that told; empty while it is usable.
  [[nodiscard]] std::string aborted() const;

  /// The last calls of this rank, shared by all groups split from one world.
  [[nodiscard]] FlightRecorder& recorder() const;

  /// What this rank waits for now: a line per pending call of this group, with the peers that have
  /// not answered where the backend knows them. Empty when nothing is pending.
  [[nodiscard]] std::string pending_report() const;

  /// What this rank waits for and did before, over the world that this group was split from and all
  /// its groups: for a hang, a signal or a time limit. Any thread; never waits for peers.
  [[nodiscard]] std::string report() const;

 private:
  [[nodiscard]] Work start(const detail::Request& request, const CallOptions& options);

  std::shared_ptr<detail::GroupImpl> impl_;
};

}  // namespace meshloom::comm
