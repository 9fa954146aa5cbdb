#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/core/export.h"

namespace meshloom::data {

/// Text to token ids. Thread safe.
class MESHLOOM_API Tokenizer {
 public:
  virtual ~Tokenizer();
  /// @throws DataError  the text is not valid UTF-8; says at which byte.
  [[nodiscard]] virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;
  [[nodiscard]] virtual std::int64_t vocab_size() const = 0;
  [[nodiscard]] virtual std::int32_t eos() const = 0;  ///< -1: none
  /// Changes when the mapping does; part of cache keys.
  [[nodiscard]] virtual std::string fingerprint() const = 0;
};

/// A SentencePiece model file. @throws IoError, DataError
[[nodiscard]] MESHLOOM_API std::shared_ptr<Tokenizer> load_sentencepiece(const std::string& path);

struct TokenizerTraining {
  std::int64_t vocab_size = 8192;
  std::int64_t max_bytes = 30'000'000;  ///< of text sampled for training
  std::uint64_t seed = 0;
};

/// Trains a byte-fallback BPE on text files and writes `model_path` (temporary name, rename).
MESHLOOM_API void train_sentencepiece(const std::vector<std::string>& files,
                                      const std::string& model_path,
                                      const TokenizerTraining& options);

}  // namespace meshloom::data
