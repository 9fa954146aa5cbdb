#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "meshloom/core/export.h"
#include "meshloom/data/source.h"
#include "meshloom/data/tokenizer.h"

namespace meshloom::data {

/// Documents held in memory. @throws DataError  a mask's size differs from its tokens'.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> documents(std::vector<Document> documents,
                                                             std::string name = "documents");

/// Documents behind a function, e.g. a Python sequence: `load(i)` for i in [0, size). It is called
/// from any thread and must give the same document every time.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> callback_source(
    std::string name, std::int64_t size, std::function<Document(std::int64_t)> load);

/// Reads an iterator to its end, at once, and holds its documents in memory.
/// @param next        nullopt ends the iteration.
/// @param max_tokens  limit, against iterators that never end.
/// @throws DataError  the limit was passed, or a document is malformed; names its number.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> iterator_source(
    const std::string& name, const std::function<std::optional<Document>()>& next,
    std::int64_t max_tokens = 1'000'000'000);

/// One source of several, each document equally likely: the natural mixture.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> concatenate(
    std::vector<std::shared_ptr<Source>> sources);

enum class InvalidText : std::uint8_t {
  kError,  ///< DataError that names file and byte
  kSkip,   ///< the document counts as empty: the loader passes over it and counts it
};

/// How text becomes a document.
struct TextOptions {
  bool add_bos = false;  ///< where the tokenizer has one
  bool add_eos = true;
  InvalidText invalid_utf8 = InvalidText::kError;
};

struct TextFolderOptions : TextOptions {
  /// File name endings to take, e.g. ".py"; empty takes all. Files named directly are always taken.
  std::vector<std::string> extensions;
  std::int64_t max_file_bytes = 1LL << 30;  ///< longer files are refused by name
};

/// The files of folders, found recursively and sorted by path; metadata only.
struct MESHLOOM_API TextListing {
  struct File {
    std::string path;
    std::string key;  ///< folder name and path below it: stays when the folder moves
    std::int64_t bytes = 0;
    std::int64_t mtime_ns = 0;
  };
  std::vector<File> files;
  std::int64_t bytes = 0;
  std::int64_t hidden = 0;  ///< files and folders whose name starts with a dot, not entered
  std::int64_t binary = 0;  ///< files with a zero byte in their first 4,096
  std::int64_t empty = 0;
  std::int64_t other_extension = 0;
  /// "1,234 files, 56.7 MB; passed over: 3 hidden, 2 binary, ..."
  [[nodiscard]] std::string summary() const;
};

/// Looks at names, sizes and the first bytes of each file. Symbolic links to folders are not
/// followed. @throws IoError  a path is not there; DataError  nothing was found; names the paths.
[[nodiscard]] MESHLOOM_API TextListing list_text_files(const std::vector<std::string>& paths,
                                                       const TextFolderOptions& options = {});

/// A document per file. @throws DataError (on load)  invalid UTF-8: file and byte; the file changed
/// since it was listed.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> text_files(TextListing listing,
                                                              std::shared_ptr<Tokenizer> tokenizer,
                                                              const TextOptions& options = {});

/// `text_files` of `list_text_files`.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> text_folder(
    const std::vector<std::string>& paths, std::shared_ptr<Tokenizer> tokenizer,
    const TextFolderOptions& options = {});

/// A document per line of JSON: `{"text": "..."}`, or `{"tokens": [...]}` with an optional
/// `"loss_mask": [...]` of numbers or booleans; other keys are ignored, blank lines too.
/// @param paths      files, or folders whose *.jsonl are taken.
/// @param tokenizer  may be null where all lines hold tokens.
/// @throws IoError  a path is not there; DataError  no lines; on load: names file:line.
[[nodiscard]] MESHLOOM_API std::shared_ptr<Source> jsonl(const std::vector<std::string>& paths,
                                                         std::shared_ptr<Tokenizer> tokenizer,
                                                         const TextOptions& options = {});

}  // namespace meshloom::data
