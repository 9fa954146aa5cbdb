#include "meshloom/mesh/layout.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cstdint>
#include <string_view>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

constexpr const char* kWhere = "mesh.layout";

std::string nearest_divisors(int value, int wanted) {
  int below = 0;
  int above = 0;
  for (int d = 1; d <= value; ++d) {
    if (value % d != 0) continue;
    if (d <= wanted) below = d;
    if (d >= wanted && above == 0) above = d;
  }
  if (above == 0 || above == below) return std::to_string(below);
  return fmt::format("{} and {}", below, above);
}

template <class LayoutType>
auto fields(LayoutType& layout) {
  using Size = decltype(&layout.tp);
  return std::array<std::pair<std::string_view, Size>, 5>{{{"tp", &layout.tp},
                                                           {"hdp", &layout.hdp},
                                                           {"pp", &layout.pp},
                                                           {"ep", &layout.ep},
                                                           {"chunks", &layout.chunks}}};
}

}  // namespace

Coordinates Layout::coordinates(int world_rank) const {
  MESHLOOM_CHECK(world_rank >= 0 && world_rank < world_size(), kWhere,
                 fmt::format("rank is {}, expected 0 .. {}", world_rank, world_size() - 1));
  return {.tp = world_rank % tp, .hdp = world_rank / tp % hdp, .pp = world_rank / (tp * hdp)};
}

int Layout::rank(const Coordinates& at) const {
  MESHLOOM_CHECK(
      at.tp >= 0 && at.tp < tp && at.hdp >= 0 && at.hdp < hdp && at.pp >= 0 && at.pp < pp, kWhere,
      fmt::format("coordinates are tp={}, hdp={}, pp={}, expected inside {}", at.tp, at.hdp, at.pp,
                  to_string()));
  return (at.pp * hdp + at.hdp) * tp + at.tp;
}

void Layout::validate() const {
  std::int64_t world = 1;
  for (const auto& [name, size] : fields(*this)) {
    MESHLOOM_CHECK(*size >= 1 && *size <= kMaxWorldSize, kWhere,
                   fmt::format("{} is {}, expected 1 .. {}", name, *size, kMaxWorldSize));
    if (name == "ep" || name == "chunks") continue;
    world *= *size;
    MESHLOOM_CHECK(
        world <= kMaxWorldSize, kWhere,
        fmt::format("tp * hdp * pp is over {}, the most ranks a layout may have", kMaxWorldSize));
  }
  MESHLOOM_CHECK(hdp % ep == 0, kWhere,
                 fmt::format("ep is {}, expected a divisor of hdp = {} (nearest: {})", ep, hdp,
                             nearest_divisors(hdp, ep)));
}

Layout Layout::parse(const std::string& text) {
  Layout result;
  std::array<bool, 5> seen{};
  std::string_view rest = text;
  while (!rest.empty()) {
    const std::size_t comma = rest.find(',');
    const std::string_view part = rest.substr(0, comma);
    rest = comma == std::string_view::npos ? std::string_view{} : rest.substr(comma + 1);
    MESHLOOM_CHECK(comma == std::string_view::npos || !rest.empty(), kWhere,
                   fmt::format("\"{}\" ends in a comma", text));
    const std::size_t equals = part.find('=');
    MESHLOOM_CHECK(equals != std::string_view::npos, kWhere,
                   fmt::format("\"{}\" in \"{}\", expected name=size", part, text));
    const std::string_view name = part.substr(0, equals);
    const std::string_view digits = part.substr(equals + 1);
    bool known = false;
    const auto table = fields(result);
    for (std::size_t i = 0; i < table.size(); ++i) {
      if (table[i].first != name) continue;
      known = true;
      MESHLOOM_CHECK(!std::exchange(seen[i], true), kWhere,
                     fmt::format("\"{}\" gives {} twice", text, name));
      const char* end = digits.data() + digits.size();
      const auto parsed = std::from_chars(digits.data(), end, *table[i].second);
      MESHLOOM_CHECK(parsed.ec == std::errc{} && parsed.ptr == end, kWhere,
                     fmt::format("{} is \"{}\", expected a whole number", name, digits));
    }
    MESHLOOM_CHECK(
        known, kWhere,
        fmt::format("unknown name \"{}\" in \"{}\"; known: tp, hdp, pp, ep, chunks", name, text));
  }
  result.validate();
  return result;
}

std::string Layout::to_string() const {
  std::string text = fmt::format("hdp={}", hdp);
  for (const auto& [name, size] : fields(*this)) {
    if (name != "hdp" && *size != 1) text += fmt::format(",{}={}", name, *size);
  }
  return text;
}

}  // namespace meshloom
