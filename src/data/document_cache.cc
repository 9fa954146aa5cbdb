#include "data/internal/document_cache.h"

namespace meshloom::data::detail {
namespace {

std::int64_t bytes_of(const Document& document) {
  return static_cast<std::int64_t>(document.tokens.size() * sizeof(std::int32_t) +
                                   document.loss_mask.size());
}

}  // namespace

std::shared_ptr<const Document> DocumentCache::find(std::int64_t source, std::int64_t document) {
  const std::lock_guard lock(mutex_);
  const auto found = index_.find({source, document});
  if (found == index_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->value;
}

void DocumentCache::put(std::int64_t source, std::int64_t document,
                        std::shared_ptr<const Document> value) {
  const std::lock_guard lock(mutex_);
  const Key key{source, document};
  if (index_.contains(key)) return;
  held_ += bytes_of(*value);
  entries_.push_front({key, std::move(value)});
  index_[key] = entries_.begin();
  while (held_ > budget_ && entries_.size() > 1) {
    held_ -= bytes_of(*entries_.back().value);
    index_.erase(entries_.back().key);
    entries_.pop_back();
  }
}

}  // namespace meshloom::data::detail
