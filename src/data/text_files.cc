#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>

#include "data/internal/hash.h"
#include "data/internal/text.h"
#include "data/internal/utf8.h"
#include "meshloom/core/error.h"
#include "meshloom/data/sources.h"

namespace meshloom::data {
namespace {

namespace fs = std::filesystem;

constexpr const char* kListWhere = "data.list_text_files";
constexpr std::int64_t kSniffBytes = 4096;

bool is_hidden(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.size() > 1 && name[0] == '.' && name != "..";
}

bool takes(const std::string& path, const std::vector<std::string>& extensions) {
  return extensions.empty() ||
         std::any_of(extensions.begin(), extensions.end(), [&path](const std::string& extension) {
           return std::string_view(path).ends_with(extension);
         });
}

// Size, time and first bytes of one file.
void add_file(TextListing& listing, const fs::path& path, std::string key,
              const TextFolderOptions& options) {
  const detail::InputFile file(path.string());
  const detail::FileIdentity identity = file.identity();
  if (identity.bytes == 0) {
    ++listing.empty;
    return;
  }
  if (identity.bytes > options.max_file_bytes) {
    throw DataError(kListWhere, fmt::format("{} has {} bytes, the limit max_file_bytes is {}",
                                            path.string(), identity.bytes, options.max_file_bytes));
  }
  const std::string head = file.read(0, std::min(kSniffBytes, identity.bytes));
  if (head.find('\0') != std::string::npos) {
    ++listing.binary;
    return;
  }
  listing.files.push_back({path.string(), std::move(key), identity.bytes, identity.mtime_ns});
  listing.bytes += identity.bytes;
}

void add_folder(TextListing& listing, const fs::path& root, const TextFolderOptions& options) {
  // "corpus/" and "corpus" have the same name.
  fs::path named = fs::absolute(root).lexically_normal();
  if (!named.has_filename()) named = named.parent_path();
  const std::string prefix = named.filename().string();
  std::error_code error;
  std::vector<std::pair<std::string, fs::path>> found;  // key, path
  auto entry =
      fs::recursive_directory_iterator(named, fs::directory_options::skip_permission_denied, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const fs::path& path = entry->path();
    if (is_hidden(path)) {
      ++listing.hidden;
      entry.disable_recursion_pending();
      continue;
    }
    std::error_code type_error;
    if (!entry->is_regular_file(type_error)) continue;
    if (!takes(path.native(), options.extensions)) {
      ++listing.other_extension;
      continue;
    }
    found.emplace_back(prefix + path.native().substr(named.native().size()), path);
  }
  if (error) throw IoError(kListWhere, fmt::format("{}: {}", named.string(), error.message()));
  std::sort(found.begin(), found.end());
  for (auto& [key, path] : found) add_file(listing, path, std::move(key), options);
}

std::string joined(const std::vector<std::string>& texts) {
  return fmt::format("{}", fmt::join(texts, ", "));
}

class TextSource final : public Source {
 public:
  TextSource(TextListing listing, std::shared_ptr<Tokenizer> tokenizer, const TextOptions& options)
      : files_(std::move(listing.files)),
        tokenizer_(std::move(tokenizer)),
        options_(options),
        identity_(detail::text_identity(tokenizer_.get(), options_)) {
    if (files_.empty()) throw DataError("data.text_files", "the listing holds no files");
    const std::string& first = files_[0].path;
    name_ =
        files_.size() == 1 ? first : fmt::format("{} and {} more files", first, files_.size() - 1);
  }

  const std::string& name() const override { return name_; }
  std::int64_t size() const override { return static_cast<std::int64_t>(files_.size()); }

  Document load(std::int64_t index) const override {
    const TextListing::File& file = at(index);
    const std::string text =
        detail::read_listed(file.path, {file.bytes, file.mtime_ns}, 0, file.bytes);
    return detail::text_document(text, *tokenizer_, options_, file.path);
  }

  std::string describe(std::int64_t index) const override { return at(index).path; }

  std::uint64_t order_key(std::int64_t index) const override {
    return detail::hash64(at(index).key);
  }

  std::string cache_key(std::int64_t index) const override {
    const TextListing::File& file = at(index);
    return fmt::format("{}\n{} {}\n{}", file.path, file.bytes, file.mtime_ns, identity_);
  }

  std::string fingerprint() const override {
    std::string all = identity_;
    for (const TextListing::File& file : files_) {
      all += fmt::format("\n{} {}", file.key, file.bytes);
    }
    return detail::hash128_hex(all);
  }

 private:
  const TextListing::File& at(std::int64_t index) const {
    return files_.at(static_cast<std::size_t>(index));
  }

  std::vector<TextListing::File> files_;
  std::shared_ptr<Tokenizer> tokenizer_;
  TextOptions options_;
  std::string identity_;
  std::string name_;
};

}  // namespace

std::string TextListing::summary() const {
  return fmt::format(
      "{} files, {:.1f} MB; passed over: {} hidden, {} binary, {} empty, {} of other extensions",
      files.size(), static_cast<double>(bytes) / 1e6, hidden, binary, empty, other_extension);
}

TextListing list_text_files(const std::vector<std::string>& paths,
                            const TextFolderOptions& options) {
  TextListing listing;
  for (const std::string& given : paths) {
    const fs::path path(given);
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (fs::is_directory(status)) {
      add_folder(listing, path, options);
    } else if (fs::is_regular_file(status)) {
      add_file(listing, fs::absolute(path).lexically_normal(), path.filename().string(), options);
    } else {
      throw IoError(
          kListWhere,
          fmt::format("{}: {}", given, error ? error.message() : "neither a file nor a folder"));
    }
  }
  if (listing.files.empty()) {
    throw DataError(
        kListWhere,
        fmt::format(
            "no text files under {} ({}{})", joined(paths), listing.summary(),
            options.extensions.empty() ? std::string() : "; wanted " + joined(options.extensions)));
  }
  return listing;
}

std::shared_ptr<Source> text_files(TextListing listing, std::shared_ptr<Tokenizer> tokenizer,
                                   const TextOptions& options) {
  if (tokenizer == nullptr) throw InvalidArgument("data.text_files", "a tokenizer is needed");
  return std::make_shared<TextSource>(std::move(listing), std::move(tokenizer), options);
}

std::shared_ptr<Source> text_folder(const std::vector<std::string>& paths,
                                    std::shared_ptr<Tokenizer> tokenizer,
                                    const TextFolderOptions& options) {
  return text_files(list_text_files(paths, options), std::move(tokenizer), options);
}

}  // namespace meshloom::data
