#include "meshloom/cost/transfer_refiner.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

constexpr const char* kTransferWhere = "cost.transfer_refiner";
constexpr const char* kTransferFormat = "meshloom.transfer_refiner/1";
/// What a step counts when the next one is there: 1/e after 16.
const double kDecay = std::exp(-1.0 / 16.0);

constexpr std::array<std::pair<const char*, double TransferTiming::*>, 6> kFigures{
    {{"out_bytes", &TransferTiming::out_bytes},
     {"out_seconds", &TransferTiming::out_seconds},
     {"back_bytes", &TransferTiming::back_bytes},
     {"back_seconds", &TransferTiming::back_seconds},
     {"saved_bytes", &TransferTiming::saved_bytes},
     {"tokens", &TransferTiming::tokens}}};

void check(const TransferTiming& timing) {
  for (const auto& [name, figure] : kFigures) {
    MESHLOOM_CHECK(std::isfinite(timing.*figure) && timing.*figure >= 0.0, kTransferWhere,
                   fmt::format("{} is {}, expected a finite number >= 0", name, timing.*figure));
  }
}

}  // namespace

void TransferRefiner::add(const TransferTiming& timing) {
  check(timing);
  for (const auto& [name, figure] : kFigures) {
    sums_.*figure = kDecay * sums_.*figure + timing.*figure;
  }
}

double TransferRefiner::seconds_per_token(int ranks) const {
  if (sums_.out_bytes <= 0.0 || sums_.tokens <= 0.0 || ranks < 1) return 0.0;
  const double back = sums_.back_bytes > 0.0 ? sums_.back_seconds / sums_.back_bytes : 0.0;
  const double seconds_per_byte = std::max(sums_.out_seconds / sums_.out_bytes, back);
  return seconds_per_byte * sums_.saved_bytes / sums_.tokens / ranks;
}

std::string TransferRefiner::to_json() const {
  nlohmann::json state{{"format", kTransferFormat}};
  for (const auto& [name, figure] : kFigures) state[name] = sums_.*figure;
  return state.dump();
}

TransferRefiner TransferRefiner::from_json(std::string_view text) {
  TransferRefiner refiner;
  try {
    const auto state = nlohmann::json::parse(text);
    MESHLOOM_CHECK(state.at("format") == kTransferFormat, kTransferWhere,
                   "format is " + state.at("format").dump());
    for (const auto& [name, figure] : kFigures) state.at(name).get_to(refiner.sums_.*figure);
  } catch (const nlohmann::json::exception& error) {
    throw InvalidArgument(kTransferWhere, fmt::format("not a state: {}", error.what()));
  }
  check(refiner.sums_);
  return refiner;
}

}  // namespace meshloom
