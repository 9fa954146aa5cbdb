#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "meshloom/data/source.h"

namespace meshloom::data::detail {

/// The documents used last, within a budget of bytes (the newest one always). Thread safe.
class DocumentCache {
 public:
  explicit DocumentCache(std::int64_t budget_bytes) : budget_(budget_bytes) {}

  [[nodiscard]] std::shared_ptr<const Document> find(std::int64_t source, std::int64_t document);
  void put(std::int64_t source, std::int64_t document, std::shared_ptr<const Document> value);

 private:
  using Key = std::pair<std::int64_t, std::int64_t>;
  struct Entry {
    Key key;
    std::shared_ptr<const Document> value;
  };

  std::int64_t budget_;
  std::int64_t held_ = 0;
  std::mutex mutex_;
  std::list<Entry> entries_;  ///< newest first
  std::map<Key, std::list<Entry>::iterator> index_;
};

}  // namespace meshloom::data::detail
