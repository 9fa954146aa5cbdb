#include "meshloom/data/source.h"

#include <fmt/format.h>

#include <algorithm>

#include "data/internal/hash.h"
#include "meshloom/core/error.h"
#include "meshloom/core/random.h"

namespace meshloom::data {

std::int64_t Document::loss_tokens() const {
  if (tokens.empty()) return 0;
  if (loss_mask.empty()) return static_cast<std::int64_t>(tokens.size()) - 1;
  return std::count_if(loss_mask.begin() + 1, loss_mask.end(),
                       [](std::uint8_t target) { return target != 0; });
}

Document Document::slice(std::int64_t begin, std::int64_t end) const {
  const auto size = static_cast<std::int64_t>(tokens.size());
  if (begin < 0 || end < begin || end > size) {
    throw InvalidArgument("data.slice",
                          fmt::format("tokens [{}, {}) of a document of {}", begin, end, size));
  }
  Document piece;
  piece.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
  if (!loss_mask.empty()) {
    piece.loss_mask.assign(loss_mask.begin() + begin, loss_mask.begin() + end);
  }
  return piece;
}

Source::~Source() = default;

std::string Source::describe(std::int64_t index) const {
  return fmt::format("{}[{}]", name(), index);
}

std::uint64_t Source::order_key(std::int64_t index) const {
  return random_bits(random_key("document", 0), static_cast<std::uint64_t>(index));
}

std::string Source::cache_key(std::int64_t) const { return {}; }

std::string Source::fingerprint() const {
  std::string keys;
  const std::int64_t count = size();
  keys.reserve(static_cast<std::size_t>(count) * sizeof(std::uint64_t));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint64_t key = order_key(i);
    keys.append(reinterpret_cast<const char*>(&key), sizeof(key));
  }
  return detail::hash128_hex(keys);
}

}  // namespace meshloom::data
