#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/data/source.h"
#include "meshloom/plan/sample.h"

namespace meshloom::data {

/// A document, or a piece of one that was longer than `max_document_tokens`.
struct DocumentRef {
  std::int64_t source = 0;
  std::int64_t document = 0;
  std::int64_t begin = 0;  ///< token range of the document
  std::int64_t end = 0;
  friend bool operator==(const DocumentRef&, const DocumentRef&) = default;
};

/// What one optimizer step trains on; sample i is refs[i] and has id i.
struct MESHLOOM_API StepMembership {
  std::int64_t step = 0;
  std::vector<plan::SampleInfo> samples;
  std::vector<DocumentRef> refs;
  std::int64_t epoch = 0;
  std::int64_t split_documents = 0;  ///< documents so far that were cut into pieces

  /// Bytes to broadcast, and back. @throws DataError  malformed.
  [[nodiscard]] std::string to_bytes() const;
  [[nodiscard]] static StepMembership from_bytes(const std::string& bytes);
};

struct WeightedSource {
  std::shared_ptr<Source> source;
  double weight = 1.0;  ///< share of tokens, relative
};

struct LoaderOptions {
  std::int64_t global_batch_tokens = 0;  ///< a step takes documents until it holds at least these
  std::int64_t max_document_tokens = 0;  ///< longer documents are split into pieces
  std::uint64_t seed = 0;
  double held_out_fraction = 0.0;  ///< of documents, chosen by hash; never trained on
  std::int64_t prefetch_steps = 2;
};

/// Decides step membership: a pure function of options and sources, never of the layout. Tokenises
/// ahead in the background, so lengths are known before payload is needed. `next` is called where
/// plans are made (one rank); `load` on every rank for the samples it trains on.
class MESHLOOM_API Loader {
 public:
  Loader(std::vector<WeightedSource> sources, const LoaderOptions& options);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  /// Membership of the next step; blocks until its lengths are known.
  /// @throws DataError  no documents, or a source failed; names it.
  [[nodiscard]] StepMembership next();

  /// Held-out documents, the same on every call.
  [[nodiscard]] StepMembership held_out(std::int64_t max_tokens);

  /// The tokens of one sample. A piece's first token is never a target.
  [[nodiscard]] Document load(const DocumentRef& ref) const;

  /// Position as text after the last `next`; `restore` continues with exactly the step that `next`
  /// would have given.
  [[nodiscard]] std::string state() const;
  void restore(const std::string& state);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::data
