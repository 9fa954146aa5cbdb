#include <fmt/format.h>
#include <sentencepiece_processor.h>

#include <utility>

#include "data/internal/hash.h"
#include "data/internal/text.h"
#include "data/internal/utf8.h"
#include "meshloom/core/error.h"
#include "meshloom/data/tokenizer.h"

namespace meshloom::data {
namespace {

// U+2581: what SentencePiece writes a space as, so that one in the text would come back as a space.
constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(const std::string& path, const std::string& model)
      : fingerprint_("sentencepiece " + detail::hash128_hex(model)) {
    const auto status = processor_.LoadFromSerializedProto(model);
    if (!status.ok() || processor_.GetPieceSize() < 1) {
      throw DataError("data.load_sentencepiece",
                      fmt::format("{} is no SentencePiece model: {}", path, status.ToString()));
    }
    for (const char byte : kSpaceSymbol) {
      const std::string piece = fmt::format("<0x{:02X}>", static_cast<unsigned char>(byte));
      const int id = processor_.PieceToId(piece);
      if (processor_.IsByte(id)) space_symbol_bytes_.push_back(id);
    }
    const std::string_view probe = "  a \n\n b ";
    std::string back;
    const bool decodes = processor_.Decode(raw_encode(probe), &back).ok();
    const bool lossless = decodes && back == probe;
    if (!lossless) space_symbol_bytes_.clear();
  }

  // A lossless model gets a lossless encoding of U+2581 too, as bytes.
  std::vector<std::int32_t> encode(std::string_view text) const override {
    detail::require_utf8(text, "data.encode", "the text");
    if (space_symbol_bytes_.size() != kSpaceSymbol.size()) return raw_encode(text);
    std::vector<std::int32_t> tokens;
    while (true) {
      const std::size_t symbol = text.find(kSpaceSymbol);
      std::vector<std::int32_t> part = raw_encode(text.substr(0, symbol));
      if (symbol == std::string_view::npos && tokens.empty()) return part;
      tokens.insert(tokens.end(), part.begin(), part.end());
      if (symbol == std::string_view::npos) return tokens;
      tokens.insert(tokens.end(), space_symbol_bytes_.begin(), space_symbol_bytes_.end());
      text.remove_prefix(symbol + kSpaceSymbol.size());
    }
  }

  std::string decode(const std::vector<std::int32_t>& tokens) const override {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] >= 0 && tokens[i] < vocab_size()) continue;
      throw DataError("data.decode", fmt::format("token {} is {}, expected 0 .. {}", i, tokens[i],
                                                 vocab_size() - 1));
    }
    std::string text;
    const auto status = processor_.Decode(tokens, &text);
    if (!status.ok()) throw DataError("data.decode", status.ToString());
    return text;
  }

  std::int64_t vocab_size() const override { return processor_.GetPieceSize(); }
  std::int32_t bos() const override { return processor_.bos_id(); }
  std::int32_t eos() const override { return processor_.eos_id(); }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  std::vector<std::int32_t> raw_encode(std::string_view text) const {
    std::vector<int> ids;
    const auto status = processor_.Encode(text, &ids);
    if (!status.ok()) throw DataError("data.encode", status.ToString());
    return ids;
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::vector<std::int32_t> space_symbol_bytes_;  ///< empty where the model has no byte pieces
  std::string fingerprint_;
};

}  // namespace

std::shared_ptr<Tokenizer> load_sentencepiece(const std::string& path) {
  const detail::InputFile file(path);
  const std::string model = file.read(0, file.identity().bytes);
  return std::make_shared<SentencePieceTokenizer>(path, model);
}

}  // namespace meshloom::data
