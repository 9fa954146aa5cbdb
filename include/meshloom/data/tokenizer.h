#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::data {

/// Text to token ids and back. Thread safe.
class MESHLOOM_API Tokenizer {
 public:
  virtual ~Tokenizer();
  /// The text as it is: no begin or end token is added.
  /// @throws DataError  the text is not valid UTF-8; says at which byte.
  [[nodiscard]] virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;
  /// @throws DataError  an id is outside the vocabulary.  @throws NotSupported  it cannot decode.
  [[nodiscard]] virtual std::string decode(const std::vector<std::int32_t>& tokens) const = 0;
  [[nodiscard]] virtual std::int64_t vocab_size() const = 0;
  [[nodiscard]] virtual std::int32_t bos() const = 0;  ///< -1: none
  [[nodiscard]] virtual std::int32_t eos() const = 0;  ///< -1: none
  /// Changes when the mapping does; part of cache keys.
  [[nodiscard]] virtual std::string fingerprint() const = 0;
};

/// A tokenizer behind functions, e.g. a tokenizer.json opened by Python's `tokenizers`. The
/// functions are called from any thread.
struct CallbackTokenizer {
  std::function<std::vector<std::int32_t>(std::string_view)> encode;    ///< given valid UTF-8
  std::function<std::string(const std::vector<std::int32_t>&)> decode;  ///< may be empty
  std::int64_t vocab_size = 0;
  std::int32_t bos = -1;
  std::int32_t eos = -1;
  std::string fingerprint;  ///< e.g. a hash of tokenizer.json
};

/// Checks UTF-8 before and the range of ids after every call.
/// @throws InvalidArgument  no encode function, no vocabulary or no fingerprint.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Tokenizer> callback_tokenizer(
    CallbackTokenizer callbacks);

/// A SentencePiece model file. @throws IoError, DataError  names the file.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Tokenizer> load_sentencepiece(const std::string& path);

struct TokenizerTraining {
  std::int64_t vocab_size = 8192;       ///< at most; small corpora give fewer
  std::int64_t max_bytes = 15'000'000;  ///< of text sampled for training
  std::uint64_t seed = 0;               ///< of the sample
};

/// Trains a BPE on text files (of *.jsonl: their "text" fields) and writes `model_path` (temporary
/// name, rename). Lossless: bytes where a character is rare, digits one by one, white space kept,
/// no normalisation, no dummy prefix. Files that are not UTF-8 are passed over. The same files and
/// options give the same bytes.
/// @throws IoError, DataError  nothing to train on; nothing was written.
MESHLOOM_API void train_sentencepiece(const std::vector<std::string>& files,
                                      const std::string& model_path,
                                      const TokenizerTraining& options = {});

}  // namespace meshloom::data
