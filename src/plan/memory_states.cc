#include "plan/internal/memory_states.h"

#include <algorithm>
#include <utility>

namespace meshloom::plan::detail {
namespace {

constexpr std::int64_t kScratchBytes = std::int64_t{1} << 20;  // of a reduction, from one peer

}  // namespace

StateMemory::StateMemory(const MemorySetting& setting, int rank, MemoryLedger& ledger)
    : ledger_(ledger), value_bytes_(setting.element_bytes), wide_bytes_(setting.wide_bytes()) {
  for (const ParameterBlock& block : parameter_blocks(setting, rank)) {
    Entry entry{.block = block, .own = (block.elements + block.replicas - 1) / block.replicas};
    if (block.replicas == 1) entry.block.zero = 1;
    const std::int64_t wide = entry.own * wide_bytes_;
    if (!shards_values(entry)) entry.values = hold(MemoryPart::kParameters, entry, value_bytes_);
    if (entry.block.zero == 1) entry.gradients = hold(MemoryPart::kGradients, entry, wide_bytes_);
    // Masters of resident values of their own type are a view of them.
    if (shards_values(entry) || value_bytes_ < wide_bytes_) {
      entry.masters = ledger_.hold(MemoryPart::kMasters, wide);
    }
    entry.moments = ledger_.hold(MemoryPart::kOptimizer, 2 * wide);
    entries_.push_back(std::move(entry));
  }
}

void StateMemory::enter(int piece, std::int64_t layer, std::int64_t next) {
  for (Entry& entry : entries_) {
    if (!shards_values(entry) || entry.block.piece != piece) continue;
    const bool wanted = covers(entry, layer) || covers(entry, next);
    if (!wanted) {
      entry.values.reset();
    } else if (!entry.values) {
      Held own;
      if (value_bytes_ < wide_bytes_) {
        own = ledger_.hold(MemoryPart::kZero, entry.own * value_bytes_);
      }
      entry.values = hold(MemoryPart::kZero, entry, value_bytes_);
    }
  }
}

void StateMemory::end_pass(int piece) {
  for (Entry& entry : entries_) {
    if (shards_values(entry) && entry.block.piece == piece) entry.values.reset();
  }
  while (!flushing_.empty()) finish(flushing_.front());
}

void StateMemory::touch(int piece, std::int64_t layer) {
  for (Entry& entry : entries_) {
    if (entry.block.zero == 1 || entry.block.piece != piece || !covers(entry, layer)) continue;
    if (!entry.gradients) entry.gradients = hold(MemoryPart::kZero, entry, wide_bytes_);
  }
}

void StateMemory::done(int piece, std::int64_t layer, bool last) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    const ParameterBlock& block = entry.block;
    if (block.piece != piece || block.first_layer != layer || block.tied) continue;
    if (block.zero == 1) {
      if (last) reduce(entry);
      continue;
    }
    reduce(entry);
    flushing_.push_back(i);
    if (flushing_.size() > 1) finish(flushing_.front());
  }
}

void StateMemory::reduce_all() {
  for (Entry& entry : entries_) {
    if (entry.block.zero != 1) continue;
    reduce(entry);
    entry.sum = entry.sum ? std::move(entry.sum) : std::move(entry.arriving);
    entry.scratch.reset();
  }
}

void StateMemory::gather() {
  Held former;
  for (Entry& entry : entries_) {
    if (shards_values(entry) || entry.block.replicas == 1) continue;
    former = hold(MemoryPart::kZero, entry, value_bytes_);
  }
}

void StateMemory::reduce(Entry& entry) {
  if (entry.block.replicas == 1 || entry.arriving || (entry.block.zero == 1 && entry.sum)) return;
  const std::int64_t bytes = entry.own * wide_bytes_;
  entry.arriving = ledger_.hold(MemoryPart::kZero, bytes);
  entry.scratch = ledger_.hold(MemoryPart::kCommunication,
                               (entry.block.replicas - 1) * std::min(kScratchBytes, bytes));
}

void StateMemory::finish(std::size_t index) {
  Entry& entry = entries_[index];
  entry.scratch.reset();
  if (!entry.sum) entry.sum = std::move(entry.arriving);
  entry.arriving.reset();
  entry.gradients.reset();
  flushing_.erase(flushing_.begin());
}

}  // namespace meshloom::plan::detail
