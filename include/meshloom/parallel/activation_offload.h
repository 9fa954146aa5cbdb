#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "meshloom/core/export.h"
#include "meshloom/cost/memory_model.h"
#include "meshloom/model/activation_store.h"
#include "meshloom/parallel/span.h"
#include "meshloom/plan/step_plan.h"

namespace meshloom::parallel {

/// Copies one way between device and host memory.
struct CopyTotals {
  std::int64_t bytes = 0;
  double seconds = 0.0;  ///< that copies took, hidden or not
};

/// What activations did on one rank in one step.
struct OffloadOutcome {
  std::int64_t saved_bytes = 0;  ///< left by the forward passes of layers
  std::int64_t peak_bytes = 0;   ///< most that was held on the device at one time, of all stores
  CopyTotals out;                ///< to host memory
  CopyTotals back;
  double exposed_seconds = 0.0;  ///< computation waited for copies
};

/// @throws PlanError  units offload and the plan's memory model is of another number of layers.
MESHLOOM_API void check_offload(const plan::StepPlan& plan, std::int64_t layers);

/// Selective offload of one rank [BS 5.1]: makes the activation stores of its micro-batches and
/// moves parts of what they hold to host memory while other layers compute.
///
/// Of a layer that is not among the model's last `resident_layers`, the first `ratio` of every
/// saved tensor (its first rows) goes out behind the layer's forward and comes back before its
/// backward. At most `resident_layers` layers are whole on the device at any time, so what is held
/// is `MemoryModel::resident_fraction`: forward waits for a copy that is more than
/// `resident_layers - 1` (at least one) layers behind it, and backward fetches as many layers
/// ahead.
///
/// Tensors in CPU memory go to a file without a name in `spill_folder`, copied by a thread of its
/// own; their pages are given back to the system and filled again in place. Tensors on an
/// accelerator go to pinned memory on a stream of its own. File, thread and stream are made when
/// something first moves.
///
/// Owned by one thread, as are the stores, which it must outlive.
class MESHLOOM_API ActivationOffload {
 public:
  /// @param spill_folder  empty: the system's folder for temporary files
  explicit ActivationOffload(std::string spill_folder = {});
  ~ActivationOffload();
  ActivationOffload(const ActivationOffload&) = delete;
  ActivationOffload& operator=(const ActivationOffload&) = delete;

  /// One step's settings; before its first store. No store is alive.
  /// @param layers  of the model
  /// @param spans   gets what computation waited, as kOffload; may be empty
  void begin_step(const MemoryModel& memory, std::int64_t layers);

  /// What computation waits for copies from now on is told to `spans` (as kOffload); may be empty.
  void set_spans(SpanSink spans);

  /// Of one micro-batch on the layers [first, second) of the model.
  /// @throws (the store's calls)  IoError: the spill file cannot be made, written or read; names
  ///   folder and bytes. Timeout: a copy takes longer than ten minutes. Gradients of the
  ///   micro-batch are lost then.
  [[nodiscard]] std::unique_ptr<model::ActivationStore> make_store(
      double ratio, std::pair<std::int64_t, std::int64_t> layers);

  /// The store whose backward comes next; its last layers are fetched while what runs before it
  /// ends. Null: none. Until another is named.
  void set_upcoming(model::ActivationStore* store);

  /// Since `begin_step`.
  [[nodiscard]] OffloadOutcome outcome() const;

 private:
  class Store;
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::parallel
