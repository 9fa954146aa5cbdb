#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "data/internal/hash.h"
#include "data/internal/text.h"
#include "data/internal/utf8.h"
#include "meshloom/core/error.h"
#include "meshloom/data/sources.h"

namespace meshloom::data {
namespace {

constexpr std::int64_t kReadBytes = 1 << 20;

struct LineFile {
  std::string path;
  std::string key;
  detail::FileIdentity identity;
};

struct Line {
  std::int64_t offset = 0;
  std::int64_t bytes = 0;
  std::int64_t number = 0;  ///< from 1
  std::int64_t file = 0;
};

// Appends the lines that are not blank.
void index_lines(const LineFile& file, std::int64_t file_index, std::vector<Line>& lines) {
  const detail::InputFile input(file.path);
  Line line{0, 0, 1, file_index};
  bool blank = true;
  const auto finish = [&](std::int64_t end) {
    line.bytes = end - line.offset;
    if (!blank) lines.push_back(line);
    line.offset = end + 1;
    ++line.number;
    blank = true;
  };
  for (std::int64_t offset = 0; offset < file.identity.bytes; offset += kReadBytes) {
    const std::string block =
        input.read(offset, std::min(kReadBytes, file.identity.bytes - offset));
    std::size_t at = 0;
    while (at < block.size()) {
      const std::size_t end = std::min(block.find('\n', at), block.size());
      if (blank) {
        const std::size_t solid = block.find_first_not_of(" \t\r", at);
        blank = solid >= end;  // npos included
      }
      if (end == block.size()) break;
      finish(offset + static_cast<std::int64_t>(end));
      at = end + 1;
    }
  }
  if (line.offset < file.identity.bytes) finish(file.identity.bytes);
}

class JsonlSource final : public Source {
 public:
  JsonlSource(const std::vector<std::string>& paths, std::shared_ptr<Tokenizer> tokenizer,
              const TextOptions& options)
      : tokenizer_(std::move(tokenizer)),
        options_(options),
        identity_(detail::text_identity(tokenizer_.get(), options_)) {
    TextFolderOptions listing_options;
    listing_options.extensions = {".jsonl"};
    listing_options.max_file_bytes = std::numeric_limits<std::int64_t>::max();
    const TextListing listing = list_text_files(paths, listing_options);
    for (const TextListing::File& file : listing.files) {
      files_.push_back({file.path, file.key, {file.bytes, file.mtime_ns}});
      index_lines(files_.back(), static_cast<std::int64_t>(files_.size()) - 1, lines_);
    }
    if (lines_.empty()) {
      throw DataError("data.jsonl", fmt::format("{} holds blank lines only", files_[0].path));
    }
    name_ = files_.size() == 1
                ? files_[0].path
                : fmt::format("{} and {} more files", files_[0].path, files_.size() - 1);
  }

  const std::string& name() const override { return name_; }
  std::int64_t size() const override { return static_cast<std::int64_t>(lines_.size()); }

  std::string describe(std::int64_t index) const override {
    return fmt::format("{}:{}", file_of(index).path, at(index).number);
  }

  std::uint64_t order_key(std::int64_t index) const override {
    return detail::hash64(file_of(index).key, static_cast<std::uint64_t>(at(index).number));
  }

  std::string cache_key(std::int64_t index) const override {
    const LineFile& file = file_of(index);
    return fmt::format("{}\n{} {} line {}\n{}", file.path, file.identity.bytes,
                       file.identity.mtime_ns, at(index).number, identity_);
  }

  std::string fingerprint() const override {
    std::string all = fmt::format("{}\n{} lines", identity_, lines_.size());
    for (const LineFile& file : files_) {
      all += fmt::format("\n{} {}", file.key, file.identity.bytes);
    }
    return detail::hash128_hex(all);
  }

  Document load(std::int64_t index) const override {
    const Line& line = at(index);
    const LineFile& file = file_of(index);
    const std::string text = detail::read_listed(file.path, file.identity, line.offset, line.bytes);
    const std::size_t bad = detail::first_invalid_utf8(text);
    if (bad != text.size()) {
      if (options_.invalid_utf8 == InvalidText::kSkip) return {};
      detail::require_utf8(text, "data.load", describe(index));
    }
    nlohmann::json json;
    try {
      json = nlohmann::json::parse(text);
    } catch (const nlohmann::json::parse_error& error) {
      fail(index, fmt::format("malformed JSON at byte {} of the line", error.byte));
    }
    if (!json.is_object()) {
      fail(index, fmt::format("a JSON {}, expected an object", json.type_name()));
    }
    if (json.contains("tokens")) return token_document(json, index);
    if (!json.contains("text")) fail(index, "neither \"text\" nor \"tokens\"");
    if (!json["text"].is_string()) {
      fail(index,
           fmt::format("\"text\" is a JSON {}, expected a string", json["text"].type_name()));
    }
    if (json.contains("loss_mask")) fail(index, "\"loss_mask\" needs \"tokens\", not \"text\"");
    if (tokenizer_ == nullptr) fail(index, "it holds text, but no tokenizer was given");
    return detail::text_document(json["text"].get_ref<const std::string&>(), *tokenizer_, options_,
                                 describe(index));
  }

 private:
  [[noreturn]] void fail(std::int64_t index, const std::string& reason) const {
    throw DataError("data.load", fmt::format("{}: {}", describe(index), reason));
  }

  Document token_document(const nlohmann::json& json, std::int64_t index) const {
    Document document;
    const auto& tokens = json["tokens"];
    if (!tokens.is_array()) {
      fail(index, fmt::format("\"tokens\" is a JSON {}, expected an array", tokens.type_name()));
    }
    document.tokens.reserve(tokens.size());
    for (const auto& token : tokens) {
      if (!token.is_number_unsigned() ||
          token.get<std::uint64_t>() > std::numeric_limits<std::int32_t>::max()) {
        fail(index, fmt::format("token {} is {}, expected an integer from 0 to 2^31 - 1",
                                document.tokens.size(), token.dump()));
      }
      document.tokens.push_back(token.get<std::int32_t>());
    }
    if (!json.contains("loss_mask") || json["loss_mask"].is_null()) return document;
    const auto& mask = json["loss_mask"];
    if (!mask.is_array() || mask.size() != tokens.size()) {
      fail(index, fmt::format("\"loss_mask\" is {}, expected an array of {} like \"tokens\"",
                              mask.is_array() ? fmt::format("an array of {}", mask.size())
                                              : fmt::format("a JSON {}", mask.type_name()),
                              tokens.size()));
    }
    document.loss_mask.reserve(mask.size());
    for (const auto& target : mask) {
      const bool boolean = target.is_boolean();
      if (!boolean && !(target.is_number() && (target == 0 || target == 1))) {
        fail(index, fmt::format("loss_mask {} is {}, expected 0, 1, true or false",
                                document.loss_mask.size(), target.dump()));
      }
      document.loss_mask.push_back(boolean ? target.get<bool>() : target == 1);
    }
    return document;
  }

  const Line& at(std::int64_t index) const { return lines_.at(static_cast<std::size_t>(index)); }
  const LineFile& file_of(std::int64_t index) const {
    return files_[static_cast<std::size_t>(at(index).file)];
  }

  std::shared_ptr<Tokenizer> tokenizer_;
  TextOptions options_;
  std::string identity_;
  std::vector<LineFile> files_;
  std::vector<Line> lines_;
  std::string name_;
};

}  // namespace

std::string detail::jsonl_text(std::string_view line) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("text") || !json["text"].is_string()) return {};
  return json["text"].get<std::string>();
}

std::shared_ptr<Source> jsonl(const std::vector<std::string>& paths,
                              std::shared_ptr<Tokenizer> tokenizer, const TextOptions& options) {
  return std::make_shared<JsonlSource>(paths, std::move(tokenizer), options);
}

}  // namespace meshloom::data
