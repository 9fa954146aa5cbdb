#include "meshloom/plan/memory_changes.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "meshloom/core/error.h"

namespace meshloom::plan {
namespace {

/// A setting with some changes, and what they are.
struct Variant {
  MemorySetting setting;
  StepLimits limits;
  std::string text;

  void add(const std::string& change) { text += (text.empty() ? "" : ", ") + change; }
};

std::optional<std::int64_t> bytes_of(const Variant& variant) {
  try {
    return fullest(variant.setting, variant.limits).total();
  } catch (const Error&) {
    return std::nullopt;  // the model can't be laid out like that
  }
}

/// The least capacity with which the longest document fits the axis.
std::int64_t least_capacity(const Variant& variant) {
  const std::int64_t hdp = variant.setting.layout.hdp;
  return std::max<std::int64_t>(1, (variant.limits.longest_document + hdp - 1) / hdp);
}

void set_capacity(Variant& variant, std::int64_t capacity) {
  variant.limits.capacity = capacity;
  variant.add(fmt::format("capacity_tokens: {}", capacity));
}

void set_recompute(Variant& variant, const char* recompute) {
  variant.setting.recompute = recompute;
  variant.add(fmt::format("parallel.recompute: {}", recompute));
}

void set_zero(Variant& variant, int zero) {
  variant.setting.zero = zero;
  variant.add(fmt::format("parallel.zero: {}", zero));
}

/// The largest capacity, a multiple of 64 below what it was, that fits.
std::optional<Variant> smaller_capacity(const Variant& base, std::int64_t most_bytes) {
  constexpr std::int64_t kStep = 64;
  std::int64_t low = (least_capacity(base) + kStep - 1) / kStep;
  std::int64_t high = (base.limits.capacity - 1) / kStep;
  std::optional<Variant> best;
  while (low <= high) {
    Variant variant = base;
    const std::int64_t middle = low + (high - low) / 2;
    set_capacity(variant, middle * kStep);
    const auto bytes = bytes_of(variant);
    if (bytes && *bytes <= most_bytes) {
      best = std::move(variant);
      low = middle + 1;
    } else {
      high = middle - 1;
    }
  }
  return best;
}

std::vector<Variant> single_changes(const Variant& base, std::int64_t most_bytes) {
  std::vector<Variant> result;
  const auto changed = [&](const auto& change) {
    Variant variant = base;
    change(variant);
    result.push_back(std::move(variant));
  };
  if (auto smaller = smaller_capacity(base, most_bytes)) result.push_back(std::move(*smaller));
  if (base.setting.recompute == "none") {
    changed([](Variant& variant) { set_recompute(variant, "selective"); });
  }
  if (base.setting.recompute != "full") {
    changed([](Variant& variant) { set_recompute(variant, "full"); });
  }
  if (base.setting.layout.hdp > 1) {
    for (int zero = base.setting.zero + 1; zero <= 3; ++zero) {
      changed([&](Variant& variant) { set_zero(variant, zero); });
    }
  }
  const Layout& layout = base.setting.layout;
  if (layout.hdp % 2 == 0 && layout.hdp / 2 % layout.ep == 0 && base.setting.split.empty()) {
    for (int Layout::*axis : {&Layout::tp, &Layout::pp}) {
      changed([&](Variant& variant) {
        Layout& other = variant.setting.layout;
        other.*axis *= 2;
        other.hdp /= 2;
        variant.limits.capacity = std::max(variant.limits.capacity, least_capacity(variant));
        variant.add("layout: " + other.to_string());
      });
    }
  }
  return result;
}

}  // namespace

MemoryForecast fullest(const MemorySetting& setting, const StepLimits& limits) {
  const std::vector<MemoryForecast> stages = forecast_memory(setting, limits);
  return *std::max_element(
      stages.begin(), stages.end(),
      [](const MemoryForecast& a, const MemoryForecast& b) { return a.total() < b.total(); });
}

std::vector<MemoryChange> memory_changes(const MemorySetting& setting, const StepLimits& limits,
                                         std::int64_t most_bytes) {
  const Variant base{setting, limits, {}};
  std::vector<MemoryChange> result;
  for (const Variant& variant : single_changes(base, most_bytes)) {
    const auto bytes = bytes_of(variant);
    if (bytes && *bytes <= most_bytes) result.push_back({variant.text, *bytes});
  }
  if (!result.empty()) return result;
  Variant all = base;
  if (setting.recompute != "full") set_recompute(all, "full");
  if (setting.layout.hdp > 1 && setting.zero < 3) set_zero(all, 3);
  if (auto smaller = smaller_capacity(all, most_bytes)) {
    all = std::move(*smaller);
  } else if (least_capacity(all) < limits.capacity) {
    set_capacity(all, least_capacity(all));
  }
  const auto bytes = bytes_of(all);
  if (bytes && !all.text.empty()) result.push_back({all.text, *bytes});
  return result;
}

}  // namespace meshloom::plan
