#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "meshloom/core/export.h"
#include "meshloom/data/source.h"

namespace meshloom::data {

/// Tokenised documents in a folder, shared by the processes of a host and by later runs. Every
/// process appends to a file of its own, opened with the first document it adds, and reads
/// everybody's. A record carries its key and checksums: what is torn or damaged is passed over and
/// counted, and its document is tokenised again. Adding never fails a run: when the disk is full,
/// the cache stops growing and `write_error` tells. The folder can be deleted between runs.
/// Thread safe.
class MESHLOOM_API TokenCache {
 public:
  struct Statistics {
    std::int64_t hits = 0;
    std::int64_t misses = 0;
    std::int64_t added = 0;
    std::int64_t damaged = 0;
    std::string write_error;  ///< empty: none
  };

  /// Creates the folder. @throws IoError  it cannot be created or listed.
  explicit TokenCache(const std::string& folder);
  ~TokenCache();
  TokenCache(const TokenCache&) = delete;
  TokenCache& operator=(const TokenCache&) = delete;

  /// The document under a key, nullopt where nobody added it or it is damaged. A miss looks once
  /// for what other processes added since.
  [[nodiscard]] std::optional<Document> find(const std::string& key);
  /// Published when this returns, to this and every other process.
  void add(const std::string& key, const Document& document);
  [[nodiscard]] Statistics statistics() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// The same documents, read through the cache where the source gives a cache key. Several sources
/// may share one cache.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> cached(std::shared_ptr<Source> source,
                                                          std::shared_ptr<TokenCache> cache);

}  // namespace meshloom::data
