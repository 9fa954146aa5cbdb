#include "meshloom/data/tokenizer.h"

#include <fmt/format.h>

#include <utility>

#include "data/internal/utf8.h"
#include "meshloom/core/error.h"

namespace meshloom::data {
namespace {

class FunctionTokenizer final : public Tokenizer {
 public:
  explicit FunctionTokenizer(CallbackTokenizer callbacks) : callbacks_(std::move(callbacks)) {}

  std::vector<std::int32_t> encode(std::string_view text) const override {
    detail::require_utf8(text, "data.encode", "the text");
    std::vector<std::int32_t> tokens = callbacks_.encode(text);
    check(tokens, "data.encode");
    return tokens;
  }

  std::string decode(const std::vector<std::int32_t>& tokens) const override {
    if (!callbacks_.decode) {
      throw NotSupported("data.decode", "this callback tokenizer was given no decode function");
    }
    check(tokens, "data.decode");
    return callbacks_.decode(tokens);
  }

  std::int64_t vocab_size() const override { return callbacks_.vocab_size; }
  std::int32_t bos() const override { return callbacks_.bos; }
  std::int32_t eos() const override { return callbacks_.eos; }
  std::string fingerprint() const override { return callbacks_.fingerprint; }

 private:
  void check(const std::vector<std::int32_t>& tokens, const char* where) const {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] >= 0 && tokens[i] < callbacks_.vocab_size) continue;
      throw DataError(where, fmt::format("token {} is {}, expected 0 .. {}", i, tokens[i],
                                         callbacks_.vocab_size - 1));
    }
  }

  CallbackTokenizer callbacks_;
};

}  // namespace

Tokenizer::~Tokenizer() = default;

std::shared_ptr<Tokenizer> callback_tokenizer(CallbackTokenizer callbacks) {
  const char* where = "data.callback_tokenizer";
  if (!callbacks.encode) throw InvalidArgument(where, "an encode function is needed");
  if (callbacks.vocab_size < 1) {
    throw InvalidArgument(where,
                          fmt::format("vocab_size is {}, expected > 0", callbacks.vocab_size));
  }
  if (callbacks.fingerprint.empty()) {
    throw InvalidArgument(where, "a fingerprint is needed, e.g. a hash of tokenizer.json");
  }
  for (const std::int32_t special : {callbacks.bos, callbacks.eos}) {
    if (special < -1 || special >= callbacks.vocab_size) {
      throw InvalidArgument(where,
                            fmt::format("bos {} and eos {} must lie within -1 .. {}", callbacks.bos,
                                        callbacks.eos, callbacks.vocab_size - 1));
    }
  }
  return std::make_shared<FunctionTokenizer>(std::move(callbacks));
}

}  // namespace meshloom::data
