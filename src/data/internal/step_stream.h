#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/data/loader.h"

namespace meshloom::data::detail {

struct SourcePosition {
  std::int64_t pass = 0;         ///< complete passes
  std::int64_t next = 0;         ///< place in the pass's order
  std::int64_t tokens = 0;       ///< given so far, all passes
  std::int64_t pass_tokens = 0;  ///< given in this pass
};

/// Everything that decides the steps to come.
struct StreamPosition {
  struct Pending {
    std::int64_t source = 0;
    std::int64_t document = 0;
    std::int64_t begin = 0;
  };
  std::int64_t step = 0;
  std::int64_t split_documents = 0;
  std::int64_t skipped_documents = 0;
  std::vector<SourcePosition> sources;
  std::optional<Pending> pending;  ///< drawn, but not or not wholly in a step yet

  [[nodiscard]] std::string to_json() const;
  /// @throws DataError  malformed, or of another number of sources.
  [[nodiscard]] static StreamPosition from_json(const std::string& text, std::size_t sources);
};

using Fetch =
    std::function<std::shared_ptr<const Document>(std::int64_t source, std::int64_t document)>;

/// The membership rule of `Loader`, without threads. Not thread safe.
class StepStream {
 public:
  /// @throws DataError  a source has no documents, or none to train on.
  StepStream(const std::vector<WeightedSource>& sources, const LoaderOptions& options);

  [[nodiscard]] StreamPosition start() const;
  /// @throws DataError  the position is not one of this stream.
  void check(const StreamPosition& position) const;
  /// The step at `position`, which moves behind it. @throws what `fetch` does, with `position` as
  /// it was; DataError for a pass without tokens.
  [[nodiscard]] StepMembership advance(StreamPosition& position, const Fetch& fetch);
  [[nodiscard]] StepMembership held_out(std::int64_t max_tokens, const Fetch& fetch) const;

 private:
  struct Entry {
    std::uint64_t key;
    std::int64_t document;
  };
  struct Stream {
    const Source* source;
    double weight;
    std::vector<Entry> documents;  ///< to train on
    std::vector<std::int64_t> order;
    std::int64_t order_pass = -1;
  };
  struct HeldOut {
    std::uint64_t key;
    std::int64_t source;
    std::int64_t document;
  };

  void hold_out(double fraction);
  void order_pass(std::size_t source, std::int64_t pass);
  [[nodiscard]] StreamPosition::Pending draw(StreamPosition& position, const Fetch& fetch,
                                             std::shared_ptr<const Document>& document);
  void add(StepMembership& step, const DocumentRef& ref, const Document& document) const;

  std::vector<Stream> streams_;
  std::vector<HeldOut> held_out_;
  std::int64_t batch_;
  std::int64_t longest_;
  std::uint64_t seed_;
};

}  // namespace meshloom::data::detail
