#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "meshloom/plan/memory_forecast.h"
#include "plan/internal/memory_ledger.h"

namespace meshloom::plan::detail {

/// The states of one rank on sizes: src/parallel/model_state.cc and sharded_space.cc.
class StateMemory {
 public:
  StateMemory(const MemorySetting& setting, int rank, MemoryLedger& ledger);

  /// The layer's sharded parameters come, and those of the layer after it; others go.
  void enter(int piece, std::int64_t layer, std::int64_t next);
  void end_pass(int piece);
  /// Gradients of a layer begin to accumulate.
  void touch(int piece, std::int64_t layer);
  /// They are complete for this micro-batch, of the step where `last`.
  void done(int piece, std::int64_t layer, bool last);
  void reduce_all();
  /// Updated parameters on their way: two parts at a time.
  void gather();

 private:
  struct Entry {
    ParameterBlock block;
    std::int64_t own = 0;  ///< elements that this rank updates
    Held values{};
    Held gradients{};
    Held masters{};
    Held moments{};
    Held arriving{};  ///< a sum under way
    Held scratch{};
    Held sum{};
  };

  [[nodiscard]] Held hold(MemoryPart part, const Entry& entry, std::int64_t bytes) {
    return ledger_.hold(part, entry.block.elements * bytes);
  }
  static bool shards_values(const Entry& entry) { return entry.block.zero == 3; }
  static bool covers(const Entry& entry, std::int64_t layer) {
    return entry.block.first_layer <= layer && layer <= entry.block.last_layer;
  }
  void reduce(Entry& entry);
  void finish(std::size_t index);

  MemoryLedger& ledger_;
  std::int64_t value_bytes_;
  std::int64_t wide_bytes_;
  std::vector<Entry> entries_;
  std::vector<std::size_t> flushing_;
};

}  // namespace meshloom::plan::detail
