#include <fmt/format.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "data/internal/output_file.h"
#include "data/internal/text.h"
#include "data/internal/utf8.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"
#include "meshloom/data/tokenizer.h"

namespace meshloom::data {
namespace {

constexpr const char* kTrainWhere = "data.train_sentencepiece";
constexpr std::int64_t kWindowBytes = 256 << 10;  // sampling unit
constexpr std::size_t kSentenceBytes = 8 << 10;   // positions inside a word are 16 bits
constexpr std::int64_t kByteAndControlPieces = 256 + 3;

struct Window {
  std::uint64_t key;
  std::size_t file;
  std::int64_t offset;
};

// Index behind the first line break at or after `offset`; the file's end where there is none.
std::int64_t line_start(const detail::InputFile& file, std::int64_t offset, std::int64_t bytes) {
  if (offset <= 0) return 0;
  for (std::int64_t at = offset - 1; at < bytes; at += kWindowBytes) {
    const std::size_t found = file.read(at, std::min(kWindowBytes, bytes - at)).find('\n');
    if (found != std::string::npos) return at + static_cast<std::int64_t>(found) + 1;
  }
  return bytes;
}

std::string window_text(const std::string& path, std::int64_t offset) {
  const detail::InputFile file(path);
  const std::int64_t bytes = file.identity().bytes;
  const std::int64_t begin = line_start(file, offset, bytes);
  const std::int64_t end = line_start(file, offset + kWindowBytes, bytes);
  if (begin >= end) return {};
  std::string text = file.read(begin, end - begin);
  if (!std::string_view(path).ends_with(".jsonl")) return text;
  std::string fields;
  for (std::string_view rest = text; !rest.empty();) {
    const std::size_t line = std::min(rest.find('\n'), rest.size() - 1) + 1;
    fields += detail::jsonl_text(rest.substr(0, line)) + '\n';
    rest.remove_prefix(line);
  }
  return fields;
}

// Whole lines of at most kSentenceBytes; a longer line is cut between characters.
class Sentences final : public sentencepiece::SentenceIterator {
 public:
  explicit Sentences(std::vector<std::string> texts) : texts_(std::move(texts)) { Next(); }

  bool done() const override { return sentence_.empty(); }
  const std::string& value() const override { return sentence_; }
  sentencepiece::util::Status status() const override { return {}; }

  void Next() override {
    sentence_.clear();
    while (text_ < texts_.size() && at_ == texts_[text_].size()) {
      std::string().swap(texts_[text_++]);
      at_ = 0;
    }
    if (text_ == texts_.size()) return;
    const std::string_view rest = std::string_view(texts_[text_]).substr(at_);
    std::size_t size = std::min(rest.size(), kSentenceBytes);
    if (size < rest.size()) {
      const std::size_t line = rest.rfind('\n', size - 1);
      if (line != std::string_view::npos) {
        size = line + 1;
      } else {
        while (size > 1 && (static_cast<unsigned char>(rest[size]) & 0xC0) == 0x80) --size;
      }
    }
    sentence_ = rest.substr(0, size);
    at_ += size;
  }

 private:
  std::vector<std::string> texts_;
  std::size_t text_ = 0;
  std::size_t at_ = 0;
  std::string sentence_;
};

std::vector<std::string> sample_texts(const std::vector<std::string>& files,
                                      const TokenizerTraining& options) {
  const std::uint64_t key = random_key("tokenizer sample", options.seed);
  std::vector<Window> windows;
  for (std::size_t i = 0; i < files.size(); ++i) {
    const std::int64_t bytes = detail::InputFile(files[i]).identity().bytes;
    for (std::int64_t offset = 0; offset < bytes; offset += kWindowBytes) {
      windows.push_back({random_bits(key, windows.size()), i, offset});
    }
  }
  std::sort(windows.begin(), windows.end(), [](const Window& a, const Window& b) {
    return std::tie(a.key, a.file, a.offset) < std::tie(b.key, b.file, b.offset);
  });
  std::vector<std::string> texts;
  std::int64_t taken = 0;
  for (const Window& window : windows) {
    std::string text = window_text(files[window.file], window.offset);
    const auto bytes = static_cast<std::int64_t>(text.size());
    if (bytes == 0 || text.find('\0') != std::string::npos) continue;
    if (detail::first_invalid_utf8(text) != text.size()) continue;
    if (taken + bytes > options.max_bytes && !texts.empty()) break;
    taken += bytes;
    texts.push_back(std::move(text));
  }
  if (texts.empty()) {
    throw DataError(kTrainWhere, fmt::format("no UTF-8 text in {} files{}", files.size(),
                                             files.empty() ? "" : ", the first " + files[0]));
  }
  return texts;
}

}  // namespace

void train_sentencepiece(const std::vector<std::string>& files, const std::string& model_path,
                         const TokenizerTraining& options) {
  if (options.vocab_size <= kByteAndControlPieces) {
    throw InvalidArgument(kTrainWhere, fmt::format("vocab_size is {}, expected more than the {} "
                                                   "byte and control pieces",
                                                   options.vocab_size, kByteAndControlPieces));
  }
  if (options.max_bytes < 1) {
    throw InvalidArgument(kTrainWhere,
                          fmt::format("max_bytes is {}, expected > 0", options.max_bytes));
  }
  Sentences sentences(sample_texts(files, options));
  const std::unordered_map<std::string, std::string> arguments{
      {"model_type", "bpe"},
      {"vocab_size", fmt::to_string(options.vocab_size)},
      {"hard_vocab_limit", "false"},
      {"character_coverage", "0.9995"},
      {"byte_fallback", "true"},
      {"split_digits", "true"},
      {"allow_whitespace_only_pieces", "true"},
      {"normalization_rule_name", "identity"},
      {"add_dummy_prefix", "false"},
      {"remove_extra_whitespaces", "false"},
      {"max_sentence_length", fmt::to_string(4 * kSentenceBytes)},
      {"num_threads", "2"},
      {"minloglevel", "2"},
      {"unk_id", "0"},
      {"bos_id", "1"},
      {"eos_id", "2"},
      {"pad_id", "-1"}};
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(arguments, &sentences, &model);
  if (!status.ok()) {
    throw DataError(
        kTrainWhere,
        fmt::format("no tokenizer of {} pieces (data.vocab_size) could be trained: the size "
                    "has to hold 256 bytes, 3 special pieces and the frequent characters, "
                    "and the text has to give that many; SentencePiece says: {}",
                    options.vocab_size, status.ToString()));
  }
  detail::write_file(model_path, model);
}

}  // namespace meshloom::data
