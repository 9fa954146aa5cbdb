#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>

#include "meshloom/plan/memory_forecast.h"

namespace meshloom::plan::detail {

/// What is held, by part, and how it was when most was held.
class MemoryLedger {
 public:
  using Bytes = std::array<std::int64_t, kMemoryParts>;

  /// A tensor's memory; goes back with the last copy of its handle.
  class Block {
   public:
    Block(MemoryLedger& ledger, MemoryPart part, std::int64_t bytes)
        : ledger_(ledger), part_(part), bytes_(bytes) {
      ledger_.add(part_, bytes_);
    }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { ledger_.add(part_, -bytes_); }
    /// The same memory, held for something else from now on.
    void become(MemoryPart part) {
      ledger_.now_[static_cast<std::size_t>(part_)] -= bytes_;
      ledger_.now_[static_cast<std::size_t>(part)] += bytes_;
      part_ = part;
    }

   private:
    MemoryLedger& ledger_;
    MemoryPart part_;
    std::int64_t bytes_;
  };

  [[nodiscard]] std::shared_ptr<Block> hold(MemoryPart part, std::int64_t bytes) {
    return std::make_shared<Block>(*this, part, bytes);
  }
  [[nodiscard]] const Bytes& most() const { return most_; }

 private:
  void add(MemoryPart part, std::int64_t bytes) {
    now_[static_cast<std::size_t>(part)] += bytes;
    total_ += bytes;
    if (total_ > most_total_) {
      most_total_ = total_;
      most_ = now_;
    }
  }

  Bytes now_{};
  Bytes most_{};
  std::int64_t total_ = 0;
  std::int64_t most_total_ = 0;
};

/// Stands for an at::Tensor: null where the code has an undefined one.
using Held = std::shared_ptr<MemoryLedger::Block>;

}  // namespace meshloom::plan::detail
