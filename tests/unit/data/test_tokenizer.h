#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "meshloom/data/tokenizer.h"

namespace meshloom::data::testing {

/// A token per byte; 256 begins and 257 ends a text.
inline std::shared_ptr<Tokenizer> byte_tokenizer(const std::string& fingerprint = "bytes") {
  CallbackTokenizer callbacks;
  callbacks.encode = [](std::string_view text) {
    std::vector<std::int32_t> tokens;
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  };
  callbacks.decode = [](const std::vector<std::int32_t>& tokens) {
    std::string text;
    for (const std::int32_t token : tokens) {
      if (token < 256) text += static_cast<char>(token);
    }
    return text;
  };
  callbacks.vocab_size = 258;
  callbacks.bos = 256;
  callbacks.eos = 257;
  callbacks.fingerprint = fingerprint;
  return callback_tokenizer(std::move(callbacks));
}

}  // namespace meshloom::data::testing
