#include "data/internal/text.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "data/internal/utf8.h"
#include "meshloom/core/error.h"

namespace meshloom::data::detail {

InputFile::InputFile(std::string path)
    : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (descriptor_ < 0) {
    throw IoError("data.open", fmt::format("{}: {}", path_, std::strerror(errno)));
  }
}

InputFile::~InputFile() { ::close(descriptor_); }

FileIdentity InputFile::identity() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) {
    throw IoError("data.stat", fmt::format("{}: {}", path_, std::strerror(errno)));
  }
  return {status.st_size,
          std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec};
}

std::string InputFile::read(std::int64_t offset, std::int64_t bytes) const {
  std::string text(static_cast<std::size_t>(bytes), '\0');
  std::size_t filled = 0;
  while (filled < text.size()) {
    const ssize_t got = ::pread(descriptor_, text.data() + filled, text.size() - filled,
                                offset + static_cast<off_t>(filled));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw IoError("data.read", fmt::format("{}: {}", path_, std::strerror(errno)));
    if (got == 0) break;
    filled += static_cast<std::size_t>(got);
  }
  text.resize(filled);
  return text;
}

std::string read_listed(const std::string& path, const FileIdentity& listed, std::int64_t offset,
                        std::int64_t bytes) {
  const InputFile file(path);
  const FileIdentity now = file.identity();
  std::string text;
  if (now == listed) text = file.read(offset, bytes);
  if (now != listed || static_cast<std::int64_t>(text.size()) != bytes) {
    throw DataError("data.load", fmt::format("{} changed since it was listed ({} bytes then, {} "
                                             "now)",
                                             path, listed.bytes, now.bytes));
  }
  return text;
}

Document text_document(std::string_view text, const Tokenizer& tokenizer,
                       const TextOptions& options, const std::string& who) {
  Document document;
  if (text.empty()) return document;
  if (options.invalid_utf8 == InvalidText::kSkip) {
    if (first_invalid_utf8(text) != text.size()) return document;
  } else {
    require_utf8(text, "data.load", who);
  }
  try {
    document.tokens = tokenizer.encode(text);
  } catch (const DataError& error) {
    throw DataError("data.load", fmt::format("{}: {}", who, error.what()));
  }
  if (options.add_bos && tokenizer.bos() >= 0) {
    document.tokens.insert(document.tokens.begin(), tokenizer.bos());
  }
  if (options.add_eos && tokenizer.eos() >= 0) document.tokens.push_back(tokenizer.eos());
  return document;
}

std::string text_identity(const Tokenizer* tokenizer, const TextOptions& options) {
  return fmt::format("{} bos {} eos {} invalid {}",
                     tokenizer == nullptr ? "no tokenizer" : tokenizer->fingerprint(),
                     options.add_bos, options.add_eos, static_cast<int>(options.invalid_utf8));
}

}  // namespace meshloom::data::detail
