#include "meshloom/plan/exchange_traffic.h"

#include <fmt/format.h>

#include <vector>

#include "meshloom/core/check.h"
#include "meshloom/plan/exchange_route.h"
#include "meshloom/plan/slicing.h"
#include "plan/internal/unit_times.h"

namespace meshloom::plan {
namespace {

constexpr const char* kTrafficWhere = "plan.exchange_bytes";

std::int64_t needed_in_all(std::span<const std::int64_t> lengths, int degree, std::int64_t window) {
  std::int64_t rows = 0;
  for (const std::int64_t tokens : lengths) rows += needed_rows_in_all(tokens, degree, window);
  return rows;
}

std::int64_t member_rows(std::span<const std::int64_t> lengths, int degree, int member) {
  std::int64_t rows = 0;
  for (const std::int64_t tokens : lengths) {
    for (const TokenRange& range : member_ranges(tokens, degree, member)) rows += range.size();
  }
  return rows;
}

/// Rows that travel to who attends to them, and their gradients back.
ExchangeBytes row_bytes(std::int64_t rows, std::int64_t elements, const ExchangeShape& shape) {
  const std::int64_t values = rows * elements;
  return {.forward = values * shape.wire_bytes,
          .backward = values * (shape.wire_bytes + shape.statistic_bytes)};
}

/// Heads against tokens inside groups of `group` members, and back. What a member keeps for itself
/// is not sent.
ExchangeBytes head_bytes(std::span<const std::int64_t> lengths, int degree, int group,
                         const ExchangeShape& shape) {
  ExchangeBytes bytes;
  std::int64_t all_kv = 0;
  std::vector<HeadShare> shares;
  for (int part = 0; part < group; ++part) {
    shares.push_back(head_share(shape.heads, shape.key_value_heads, group, part));
    all_kv += shares.back().kv();
  }
  for (int member = 0; member < degree; ++member) {
    const std::int64_t rows = member_rows(lengths, degree, member);
    const HeadShare& own = shares[static_cast<std::size_t>(member % group)];
    const std::int64_t q = (shape.heads - own.q()) * shape.head_dim;
    const std::int64_t kv = 2 * (all_kv - own.kv()) * shape.head_dim;
    const std::int64_t sums = (shape.heads - own.q()) * shape.statistic_bytes;
    bytes.forward += rows * (2 * q * shape.element_bytes + kv * shape.wire_bytes + sums);
    bytes.backward += rows * (2 * q * shape.element_bytes + kv * shape.wire_bytes + 2 * sums +
                              (q + kv) * shape.statistic_bytes);
  }
  return bytes;
}

}  // namespace

void ExchangeShape::validate() const {
  const auto positive = [](std::int64_t value, const char* name) {
    MESHLOOM_CHECK(value >= 1, kTrafficWhere, fmt::format("{} is {}, expected >= 1", name, value));
  };
  positive(heads, "heads");
  positive(key_value_heads, "key_value_heads");
  positive(head_dim, "head_dim");
  positive(element_bytes, "element_bytes");
  positive(wire_bytes, "wire_bytes");
  positive(statistic_bytes, "statistic_bytes");
  MESHLOOM_CHECK(
      heads % key_value_heads == 0, kTrafficWhere,
      fmt::format("key_value_heads is {}, expected a divisor of {} heads", key_value_heads, heads));
  MESHLOOM_CHECK(latent_dim >= 0, kTrafficWhere,
                 fmt::format("latent_dim is {}, expected >= 0", latent_dim));
  MESHLOOM_CHECK(window >= 0, kTrafficWhere, fmt::format("window is {}, expected >= 0", window));
}

HeadShare head_share(std::int64_t heads, std::int64_t key_value_heads, int parts, int part) {
  const std::int64_t per_group = heads / key_value_heads;
  HeadShare share;
  share.q_begin = part * heads / parts;
  share.q_end = (std::int64_t{part} + 1) * heads / parts;
  share.kv_begin = share.q_begin / per_group;
  share.kv_end = share.q() == 0 ? share.kv_begin : (share.q_end - 1) / per_group + 1;
  return share;
}

ExchangeBytes exchange_bytes(std::span<const std::int64_t> lengths, int degree, Exchange exchange,
                             int ulysses_degree, const ExchangeShape& shape) {
  shape.validate();
  MESHLOOM_CHECK(degree >= 1, kTrafficWhere, fmt::format("degree is {}, expected >= 1", degree));
  int group = 1;
  switch (exchange) {
    case Exchange::kLocal:
      return {};
    case Exchange::kRing:
    case Exchange::kAllGather:
      break;
    case Exchange::kUlysses:
      group = degree;
      break;
    case Exchange::kRingUlysses:
      MESHLOOM_CHECK(ulysses_degree >= 1 && degree % ulysses_degree == 0, kTrafficWhere,
                     fmt::format("ulysses_degree is {}, expected a divisor of {} ranks",
                                 ulysses_degree, degree));
      group = ulysses_degree;
      break;
  }
  std::int64_t kv_heads = 0;  // over the rings that run side by side
  for (int part = 0; part < group; ++part) {
    kv_heads += head_share(shape.heads, shape.key_value_heads, group, part).kv();
  }
  ExchangeBytes bytes = row_bytes(needed_in_all(lengths, degree / group, shape.window),
                                  shape.row_elements(exchange, kv_heads), shape);
  if (group > 1) {
    const ExchangeBytes heads = head_bytes(lengths, degree, group, shape);
    bytes.forward += heads.forward;
    bytes.backward += heads.backward;
  }
  return bytes;
}

ExchangeBytes exchange_bytes(const StepPlan& plan, const ExchangeShape& shape) {
  const detail::TokensById tokens_of(plan.samples);
  ExchangeBytes bytes;
  std::vector<std::int64_t> lengths;
  for (const Slot& slot : plan.slots) {
    for (const Unit& unit : slot.units) {
      lengths.clear();
      for (const std::int64_t id : unit.samples) lengths.push_back(tokens_of(id));
      const ExchangeBytes more = exchange_bytes(lengths, static_cast<int>(unit.ranks.size()),
                                                unit.exchange, unit.ulysses_degree, shape);
      bytes.forward += more.forward;
      bytes.backward += more.backward;
    }
  }
  return bytes;
}

}  // namespace meshloom::plan
