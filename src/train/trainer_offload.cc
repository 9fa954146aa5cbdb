// Activations that plans move to host memory: what planning knows about it, and what a step showed.

#include <algorithm>

#include "train/internal/trainer_impl.h"

namespace meshloom::train {

MemoryModel Trainer::Impl::memory_model() const {
  MemoryModel memory = config_.memory(static_cast<int>(model_.layers));
  // Measured copies are in seconds, and so are costs once units were.
  if (memory.layers > 0 && memory.transfer == 0.0 && fit_costs_ && cost_fit_.units() > 0) {
    memory.transfer = transfer_fit_.seconds_per_token(config_.layout.tp * config_.layout.pp);
  }
  return memory;
}

void Trainer::Impl::reduce_offload(const parallel::OffloadOutcome& own, StepMetrics& metrics) {
  if (!config_.offload.enabled || metrics.skipped) return;
  TransferTiming sum{.tokens = static_cast<double>(metrics.tokens)};
  double exposed = 0.0;
  double peak = 0.0;
  for (const std::vector<double>& rank :
       detail::gather_numbers(world_, {static_cast<double>(own.out.bytes), own.out.seconds,
                                       static_cast<double>(own.back.bytes), own.back.seconds,
                                       static_cast<double>(own.saved_bytes), own.exposed_seconds,
                                       static_cast<double>(own.peak_bytes)})) {
    sum.out_bytes += rank[0];
    sum.out_seconds += rank[1];
    sum.back_bytes += rank[2];
    sum.back_seconds += rank[3];
    sum.saved_bytes += rank[4];
    exposed += rank[5];
    peak = std::max(peak, rank[6]);
  }
  transfer_fit_.add(sum);
  metrics.extra["offload_bytes"] = sum.out_bytes;
  metrics.extra["offload_seconds"] = (sum.out_seconds + sum.back_seconds) / world_.size();
  metrics.extra["offload_exposed_seconds"] = exposed / world_.size();
  metrics.extra["activation_peak_bytes"] = peak;
}

}  // namespace meshloom::train
