#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "meshloom/data/sources.h"

namespace meshloom::data::detail {

/// Size and modification time, as a listing saw them.
struct FileIdentity {
  std::int64_t bytes = 0;
  std::int64_t mtime_ns = 0;
  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

/// An open file for reading. @throws IoError  names the path and the system's reason.
class InputFile {
 public:
  explicit InputFile(std::string path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  [[nodiscard]] FileIdentity identity() const;
  /// Up to `bytes` bytes from `offset`; fewer at the end of the file.
  [[nodiscard]] std::string read(std::int64_t offset, std::int64_t bytes) const;

 private:
  std::string path_;
  int descriptor_;
};

/// Bytes [offset, offset + bytes) of a file that must still be what it was when listed.
/// @throws DataError  it changed.
[[nodiscard]] std::string read_listed(const std::string& path, const FileIdentity& listed,
                                      std::int64_t offset, std::int64_t bytes);

/// Text to document, by the options. @throws DataError  names `who`.
[[nodiscard]] Document text_document(std::string_view text, const Tokenizer& tokenizer,
                                     const TextOptions& options, const std::string& who);

/// What of tokenizer and options decides a text's tokens; for keys.
[[nodiscard]] std::string text_identity(const Tokenizer* tokenizer, const TextOptions& options);

/// "text" of one line of JSON for tokenizer training; empty where it has none.
[[nodiscard]] std::string jsonl_text(std::string_view line);

}  // namespace meshloom::data::detail
