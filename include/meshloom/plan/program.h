#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/mesh/rank_list.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::plan {

/// The instruction table: the grain is a micro-batch (a slot's unit) on a pipeline stage.
enum class Op : std::uint8_t {
  kLoad,            ///< build this rank's slices of the unit
  kForward,         ///< of one model chunk; the last stage computes the loss too
  kBackward,        ///< input gradients, and weight gradients unless they are deferred
  kWeightGradient,  ///< the deferred part of a backward
  /// Activations or their gradients to another stage. Does not hold up the sender; the n-th send
  /// from one rank to another meets the n-th receive there.
  kSend,
  /// Offers a buffer for what a stage sends; the computation that uses it waits until it is there.
  kReceive,
  kReduce,  ///< sum of gradients over their replicas
  kStep,    ///< optimizer update, then parameters to those who need them
};

[[nodiscard]] MESHLOOM_API std::string_view to_string(Op op);

/// What meets inside an instruction: all listed world ranks arrive, in this order within the
/// instruction, or nobody proceeds.
enum class RendezvousKind : std::uint8_t {
  kExchange,      ///< keys and values with the unit
  kDispatch,      ///< tokens with the expert-parallel group
  kGather,        ///< parameters with the ZeRO group
  kTensor,        ///< activations with the tensor-parallel group
  kGradientSync,  ///< gradients with all replicas
};

[[nodiscard]] MESHLOOM_API std::string_view to_string(RendezvousKind kind);

struct Rendezvous {
  RendezvousKind kind = RendezvousKind::kExchange;
  RankList ranks;  ///< world ranks; for exchanges in the unit's ring order
  int count = 1;   ///< times it happens inside the instruction, e.g. once a layer
  friend bool operator==(const Rendezvous&, const Rendezvous&) = default;
};

struct Instruction {
  Op op = Op::kLoad;
  int slot = -1;          ///< -1 for kReduce and kStep
  int unit = -1;          ///< index in the slot; -1: idle member of a lockstep group, zero tokens
  int chunk = 0;          ///< model chunk on this rank
  int peer = -1;          ///< world rank, for kSend and kReceive
  bool gradient = false;  ///< kSend / kReceive: a gradient (backward) rather than an activation
  bool defer_weight_gradient = false;  ///< kBackward
  std::vector<Rendezvous> rendezvous{};
  friend bool operator==(const Instruction&, const Instruction&) = default;
};

/// How one rank carries out one step.
struct MESHLOOM_API Program {
  std::int64_t step = 0;
  int rank = 0;  ///< world rank
  std::vector<Instruction> instructions;
  friend bool operator==(const Program&, const Program&) = default;
};

struct Schedule;

/// What compile needs beside the plan.
struct CompileOptions {
  int layers = 1;          ///< decoder layers of the model: rendezvous counts
  std::string schedule{};  ///< by name, as in `make_schedule`
  /// A table of one's own instead.
  std::shared_ptr<const Schedule> table = nullptr;
  std::vector<int> split{};  ///< decoder layers of each piece of the model; empty: even
};

/// Programs of all ranks, in world-rank order. A pure function of its inputs. Every rank's program
/// is a subsequence of one total order over all stages, whatever slots the rank has a part in, so
/// that the programs can't deadlock even if every send waited for its receive.
/// @throws NotSupported  the layout or schedule is not built.
/// @throws PlanError     a table of one's own can't be carried out; names stage, chunk and slot.
[[nodiscard]] MESHLOOM_API std::vector<Program> compile(const StepPlan& plan,
                                                        const CompileOptions& options);
/// The program of one world rank alone (the same as compile(...)[rank], without building the rest).
[[nodiscard]] MESHLOOM_API Program compile_rank(const StepPlan& plan, const CompileOptions& options,
                                                int rank);

}  // namespace meshloom::plan
