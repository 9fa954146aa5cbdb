#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::data {

/// A tokenised document. Token t is a target (of the prediction made at t - 1) where
/// loss_mask[t] != 0; an empty mask means all. Token 0 is never a target.
struct MESHLOOM_API Document {
  std::vector<std::int32_t> tokens;
  std::vector<std::uint8_t> loss_mask;  ///< empty, or tokens.size()
  [[nodiscard]] std::int64_t loss_tokens() const;
  /// Tokens [begin, end), mask included. @throws InvalidArgument  not within the document.
  [[nodiscard]] Document slice(std::int64_t begin, std::int64_t end) const;
  friend bool operator==(const Document&, const Document&) = default;
};

/// Documents by index, in a fixed order; the unit of extension for data of one's own. Every method
/// is const, thread safe and gives the same answer on every call and every rank: step membership is
/// a function of them.
class MESHLOOM_API Source {
 public:
  virtual ~Source();
  /// For messages and for keys; the path, where there is one.
  [[nodiscard]] virtual const std::string& name() const = 0;
  [[nodiscard]] virtual std::int64_t size() const = 0;
  /// Reads and tokenises. A document without tokens is passed over and counted by the loader.
  /// @throws DataError  names the file and the byte or line.
  [[nodiscard]] virtual Document load(std::int64_t index) const = 0;

  /// Where a document is, for messages: "name[index]" unless overridden.
  [[nodiscard]] virtual std::string describe(std::int64_t index) const;
  /// Decides the document's place in every shuffle, and whether it is held out. By index unless
  /// overridden; sources of files use the path below the folder, so that neither a moved folder nor
  /// an added file changes the other documents' fate.
  [[nodiscard]] virtual std::uint64_t order_key(std::int64_t index) const;
  /// Identity of the tokens that `load` gives, for the token cache. Empty: never cached.
  [[nodiscard]] virtual std::string cache_key(std::int64_t index) const;
  /// Changes when any document may have changed; compared when a run resumes and between ranks.
  [[nodiscard]] virtual std::string fingerprint() const;
};

}  // namespace meshloom::data
