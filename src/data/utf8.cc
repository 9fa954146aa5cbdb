#include "data/internal/utf8.h"

#include <fmt/format.h>

#include <cstdint>
#include <cstring>

#include "meshloom/core/error.h"

namespace meshloom::data::detail {
namespace {

// Length of the character that begins at `at`, 0 where none does.
std::size_t character_length(const unsigned char* at, std::size_t left) {
  const unsigned char lead = at[0];
  if (lead < 0x80) return 1;
  std::size_t length = 0;
  unsigned char low = 0x80;  // bounds of the second byte
  unsigned char high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  }
  if (length == 0 || left < length || at[1] < low || at[1] > high) return 0;
  for (std::size_t i = 2; i < length; ++i) {
    if ((at[i] & 0xC0) != 0x80) return 0;
  }
  return length;
}

}  // namespace

std::size_t first_invalid_utf8(std::string_view text) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  std::size_t i = 0;
  while (i < text.size()) {
    if (i + sizeof(std::uint64_t) <= text.size()) {
      std::uint64_t eight = 0;
      std::memcpy(&eight, bytes + i, sizeof(eight));
      if ((eight & 0x8080808080808080ULL) == 0) {
        i += sizeof(eight);
        continue;
      }
    }
    const std::size_t length = character_length(bytes + i, text.size() - i);
    if (length == 0) return i;
    i += length;
  }
  return i;
}

void require_utf8(std::string_view text, const char* where, const std::string& who) {
  const std::size_t bad = first_invalid_utf8(text);
  if (bad == text.size()) return;
  throw DataError(where, fmt::format("{}: invalid UTF-8 at byte {} (0x{:02x})", who, bad,
                                     static_cast<unsigned char>(text[bad])));
}

}  // namespace meshloom::data::detail
