#pragma once

#include <chrono>
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
  std::int64_t epoch = 0;              ///< complete passes, of the source that made the fewest
  std::int64_t split_documents = 0;    ///< documents so far that were cut into pieces
  std::int64_t skipped_documents = 0;  ///< documents so far without tokens

  [[nodiscard]] std::int64_t tokens() const;
  /// Bytes to broadcast, and back. @throws DataError  malformed.
  [[nodiscard]] std::string to_bytes() const;
  [[nodiscard]] static StepMembership from_bytes(const std::string& bytes);
  friend bool operator==(const StepMembership&, const StepMembership&) = default;
};

struct WeightedSource {
  std::shared_ptr<Source> source;
  double weight = 1.0;  ///< share of tokens, relative
};

struct LoaderOptions {
  std::int64_t global_batch_tokens = 0;  ///< a step takes documents while it holds at most these
  std::int64_t max_document_tokens = 0;  ///< longer documents are split; 0: global_batch_tokens
  std::uint64_t seed = 0;
  double held_out_fraction = 0.0;  ///< of documents, chosen by hash; never trained on
  std::int64_t vocab_size = 0;     ///< token ids are checked against it; 0: only for sign
  std::int64_t prefetch_steps = 2;
  std::int64_t memory_bytes = 256LL << 20;     ///< of tokenised documents kept for `load`
  std::chrono::milliseconds timeout{600'000};  ///< of `next`
};

/// Decides step membership: a pure function of options and sources, never of the layout.
///
/// The rule. Each source has an order of its own for each pass: documents sorted by a hash of
/// (seed, source, pass, document). The next document comes from the source that has given the
/// fewest tokens for its weight (the first of equals). A document longer than
/// `max_document_tokens` is cut into pieces of that size and a rest. A step takes pieces in this
/// order while its total stays within `global_batch_tokens`, and at least one; what does not fit
/// begins the next step. Held-out documents are left out of every order.
///
/// One background thread tokenises `prefetch_steps` ahead, so lengths are known before payload is
/// needed. It starts with the first `next`, which is called where plans are made (one rank, one
/// thread); `load` and `held_out` may be called from any thread of any rank. The destructor waits
/// for the document in work: where sources call into an interpreter, release its lock first.
class MESHLOOM_API Loader {
 public:
  /// @throws InvalidArgument  options.  @throws DataError  a source has no documents to train on.
  Loader(std::vector<WeightedSource> sources, const LoaderOptions& options);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  /// Membership of the next step; blocks until its lengths are known.
  /// @throws DataError  a document is malformed, or a source gave no tokens in a whole pass; names
  ///                    it. Every later call throws the same, until `restore`.
  /// @throws Timeout    names the document in work; the next call waits again.
  [[nodiscard]] StepMembership next();

  /// Held-out documents by hash while they stay within `max_tokens`, and at least one; the same on
  /// every call. Empty where nothing is held out. With a fraction above 0 and more than one
  /// document, at least one is held out.
  [[nodiscard]] StepMembership held_out(std::int64_t max_tokens) const;

  /// The tokens of one sample. A piece's first token is never a target.
  /// @throws DataError  not a document of these sources, or unreadable; names it.
  [[nodiscard]] Document load(const DocumentRef& ref) const;

  /// Where a sample came from, for messages: "corpus/a.py", "x.jsonl:17", with the piece's tokens.
  [[nodiscard]] std::string describe(const DocumentRef& ref) const;

  /// Position as text (JSON) after the last `next`; `restore` continues with exactly the step that
  /// `next` would have given.
  [[nodiscard]] std::string state() const;
  /// @throws DataError  malformed, or of other options or sources: names what differs. The loader
  ///                    is unchanged.
  void restore(const std::string& state);

  /// Equal on two ranks if and only if they decide alike: options and the sources' fingerprints.
  [[nodiscard]] std::string fingerprint() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace meshloom::data
