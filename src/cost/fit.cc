#include "meshloom/cost/fit.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

constexpr std::size_t kTerms = 4;
using Terms = std::array<double, kTerms>;
using Gram = std::array<double, kTerms * kTerms>;
constexpr std::array<const char*, kTerms> kTermNames{"quadratic", "linear", "fixed", "exchange"};

/// Errors beyond this many typical ones count linearly, not squared.
constexpr double kHuber = 2.0;
/// No clock is better than this: a perfect fit must not make every other unit an outlier.
constexpr double kLeastScale = 1e-3;
/// From the median absolute deviation to a standard deviation.
constexpr double kDeviation = 1.4826;
/// A timing further off than this many typical errors is reported as an outlier.
constexpr double kOutlier = 5.0;
constexpr int kReweightings = 30;
/// Part of a column that the others must not explain, as a squared sine.
constexpr double kTellApart = 1e-8;
/// Units that the prior of a refiner counts for.
constexpr double kPriorUnits = 4.0;
/// Step of the running median of errors.
constexpr double kScaleStep = 0.05;
constexpr double kMostScale = 1.0;

void check(const UnitTiming& timing, const std::string& who) {
  const bool sound = timing.square_sum > 0.0 && std::isfinite(timing.square_sum) &&
                     timing.token_sum > 0.0 && std::isfinite(timing.token_sum) &&
                     timing.degree >= 1 && timing.seconds > 0.0 && std::isfinite(timing.seconds);
  if (!sound) {
    throw InvalidArgument(
        "cost.fit",
        fmt::format("{}: square_sum {}, token_sum {}, degree {}, seconds {}; expected "
                    "positive finite numbers",
                    who, timing.square_sum, timing.token_sum, timing.degree, timing.seconds));
  }
}

/// What a coefficient of one contributes, as a part of the time that was measured.
Terms features(const UnitTiming& timing) {
  const double ranks = timing.degree;
  return {timing.square_sum / ranks / timing.seconds, timing.token_sum / ranks / timing.seconds,
          1.0 / timing.seconds, (ranks - 1.0) / ranks * timing.token_sum / timing.seconds};
}

double dot(const Terms& a, const Terms& b) {
  double sum = 0.0;
  for (std::size_t i = 0; i < kTerms; ++i) sum += a[i] * b[i];
  return sum;
}

/// Cholesky on a subset of the terms. @returns false where they can't be told apart.
bool solve_subset(const Gram& gram, const Terms& target, unsigned subset, Terms& solution) {
  std::vector<std::size_t> terms;
  for (std::size_t i = 0; i < kTerms; ++i) {
    if (subset >> i & 1U) terms.push_back(i);
  }
  const std::size_t n = terms.size();
  std::vector<double> lower(n * n, 0.0);
  std::vector<double> y(n, 0.0);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      double sum = gram[terms[i] * kTerms + terms[j]];
      for (std::size_t k = 0; k < j; ++k) sum -= lower[i * n + k] * lower[j * n + k];
      if (i != j) {
        lower[i * n + j] = sum / lower[j * n + j];
        continue;
      }
      if (!(sum > kTellApart * gram[terms[i] * kTerms + terms[i]])) return false;
      lower[i * n + i] = std::sqrt(sum);
    }
    double sum = target[terms[i]];
    for (std::size_t k = 0; k < i; ++k) sum -= lower[i * n + k] * y[k];
    y[i] = sum / lower[i * n + i];
  }
  solution = {};
  for (std::size_t i = n; i-- > 0;) {
    double sum = y[i];
    for (std::size_t k = i + 1; k < n; ++k) sum -= lower[k * n + i] * solution[terms[k]];
    solution[terms[i]] = sum / lower[i * n + i];
  }
  return true;
}

/// The best coefficients that are not negative; four terms have sixteen active sets.
Terms solve_nonnegative(const Gram& gram, const Terms& target) {
  Terms best{};
  double best_value = 0.0;  // of x'Gx - 2 x't; all zero gives zero
  for (unsigned subset = 1; subset < 1U << kTerms; ++subset) {
    Terms x{};
    if (!solve_subset(gram, target, subset, x)) continue;
    if (*std::min_element(x.begin(), x.end()) < 0.0) continue;
    double value = -2.0 * dot(x, target);
    for (std::size_t i = 0; i < kTerms; ++i) {
      for (std::size_t j = 0; j < kTerms; ++j) value += x[i] * gram[i * kTerms + j] * x[j];
    }
    if (value < best_value) {
      best_value = value;
      best = x;
    }
  }
  return best;
}

void add_row(const Terms& row, double weight, Gram& gram, Terms& target) {
  for (std::size_t i = 0; i < kTerms; ++i) {
    target[i] += weight * row[i];
    for (std::size_t j = 0; j < kTerms; ++j) gram[i * kTerms + j] += weight * row[i] * row[j];
  }
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

CostModel as_model(const Terms& x) {
  return {.quadratic = x[0], .linear = x[1], .fixed = x[2], .exchange = x[3]};
}
Terms as_terms(const CostModel& model) {
  return {model.quadratic, model.linear, model.fixed, model.exchange};
}

/// Terms that play a part and can't be told apart from those before them.
void refuse_alike(const Gram& gram) {
  unsigned told = 0;
  for (std::size_t i = 0; i < kTerms; ++i) {
    if (gram[i * kTerms + i] <= 0.0) continue;
    Terms ignored{};
    if (solve_subset(gram, {}, told | 1U << i, ignored)) {
      told |= 1U << i;
      continue;
    }
    std::string others;
    for (std::size_t j = 0; j < i; ++j) {
      if (told >> j & 1U) others += (others.empty() ? "" : ", ") + std::string(kTermNames[j]);
    }
    throw InvalidArgument("cost.fit",
                          fmt::format("the units are too alike to tell {} from {}: time units of "
                                      "other lengths, token counts and degrees",
                                      kTermNames[i], others));
  }
}

double huber(double error, double scale) {
  const double limit = kHuber * std::max(scale, kLeastScale);
  return error <= limit ? 1.0 : limit / error;
}

}  // namespace

CostFit fit_cost(std::span<const UnitTiming> timings) {
  if (timings.size() < kTerms) {
    throw InvalidArgument("cost.fit",
                          fmt::format("{} timings, expected at least {}", timings.size(), kTerms));
  }
  std::vector<Terms> rows;
  Terms largest{};
  for (std::size_t i = 0; i < timings.size(); ++i) {
    check(timings[i], fmt::format("timing {}", i));
    rows.push_back(features(timings[i]));
    for (std::size_t t = 0; t < kTerms; ++t) largest[t] = std::max(largest[t], rows.back()[t]);
  }
  // Columns scaled to one, so that comparisons between them have a meaning.
  for (Terms& row : rows) {
    for (std::size_t t = 0; t < kTerms; ++t) {
      if (largest[t] > 0.0) row[t] /= largest[t];
    }
  }
  Terms x{};
  std::vector<double> errors(rows.size(), 0.0);
  double scale = 0.0;
  for (int round = 0; round < kReweightings; ++round) {
    Gram gram{};
    Terms target{};
    for (std::size_t i = 0; i < rows.size(); ++i) {
      add_row(rows[i], round == 0 ? 1.0 : huber(errors[i], scale), gram, target);
    }
    if (round == 0) refuse_alike(gram);
    x = solve_nonnegative(gram, target);
    for (std::size_t i = 0; i < rows.size(); ++i) errors[i] = std::abs(dot(rows[i], x) - 1.0);
    scale = kDeviation * median(errors);
  }
  CostFit fit;
  for (std::size_t t = 0; t < kTerms; ++t) x[t] = largest[t] > 0.0 ? x[t] / largest[t] : 0.0;
  fit.model = as_model(x);
  fit.median_error = median(errors);
  for (const double error : errors) {
    if (error > kOutlier * std::max(scale, kLeastScale)) {
      ++fit.outliers;
    } else {
      fit.worst_error = std::max(fit.worst_error, error);
    }
  }
  return fit;
}

CostRefiner::CostRefiner(const CostModel& prior, double horizon)
    : prior_(prior), horizon_(horizon), model_(prior) {
  prior.validate();
  MESHLOOM_CHECK(horizon >= 1.0 && std::isfinite(horizon), "cost.refiner",
                 fmt::format("horizon is {}, expected a number >= 1", horizon));
}

void CostRefiner::add(const UnitTiming& timing) {
  check(timing, "timing");
  const Terms row = features(timing);
  const double error = std::abs(dot(row, as_terms(model_)) - 1.0);
  const double keep = 1.0 - 1.0 / horizon_;
  for (double& value : gram_) value *= keep;
  for (double& value : target_) value *= keep;
  // Until a horizon's first part is in, the model says little about what an outlier is.
  const bool settled = static_cast<double>(units_) >= kPriorUnits * kTerms;
  add_row(row, settled ? huber(error, scale_) : 1.0, gram_, target_);
  const double typical = kDeviation * error;
  scale_ = std::clamp(scale_ * std::exp(typical > scale_ ? kScaleStep : -kScaleStep), kLeastScale,
                      kMostScale);
  ++units_;
  solve_();
}

void CostRefiner::solve_() {
  Terms column{};
  for (std::size_t i = 0; i < kTerms; ++i) {
    column[i] = std::sqrt(gram_[i * kTerms + i]);
    if (column[i] <= 0.0) column[i] = 1.0;  // never seen: the prior alone decides
  }
  // The prior may count in other units than seconds: only its shape is held to, at the scale that
  // fits best.
  Terms prior = as_terms(prior_);
  double explained = 0.0;
  for (std::size_t i = 0; i < kTerms; ++i) {
    for (std::size_t j = 0; j < kTerms; ++j)
      explained += prior[i] * gram_[i * kTerms + j] * prior[j];
  }
  const double factor = explained > 0.0 ? dot(prior, target_) / explained : 1.0;
  const double pull = kPriorUnits / std::min(static_cast<double>(units_), horizon_);
  Gram scaled{};
  Terms target{};
  for (std::size_t i = 0; i < kTerms; ++i) {
    target[i] = target_[i] / column[i] + pull * factor * prior[i] * column[i];
    for (std::size_t j = 0; j < kTerms; ++j) {
      scaled[i * kTerms + j] = gram_[i * kTerms + j] / column[i] / column[j];
    }
    scaled[i * kTerms + i] += pull;
  }
  Terms x = solve_nonnegative(scaled, target);
  for (std::size_t i = 0; i < kTerms; ++i) x[i] /= column[i];
  if (x[0] + x[1] > 0.0) model_ = as_model(x);
}

std::string CostRefiner::to_json() const {
  nlohmann::json state;
  state["format"] = "meshloom.cost_refiner/1";
  state["prior"] = as_terms(prior_);
  state["horizon"] = horizon_;
  state["model"] = as_terms(model_);
  state["units"] = units_;
  state["scale"] = scale_;
  state["gram"] = gram_;
  state["target"] = target_;
  return state.dump();
}

CostRefiner CostRefiner::from_json(std::string_view text) {
  try {
    const auto state = nlohmann::json::parse(text);
    if (state.at("format") != "meshloom.cost_refiner/1") {
      throw InvalidArgument("cost.refiner", "format is " + state.at("format").dump());
    }
    CostRefiner refiner(as_model(state.at("prior").get<Terms>()),
                        state.at("horizon").get<double>());
    refiner.model_ = as_model(state.at("model").get<Terms>());
    refiner.model_.validate();
    refiner.units_ = state.at("units").get<std::int64_t>();
    refiner.scale_ = state.at("scale").get<double>();
    refiner.gram_ = state.at("gram").get<Gram>();
    refiner.target_ = state.at("target").get<Terms>();
    return refiner;
  } catch (const nlohmann::json::exception& error) {
    throw InvalidArgument("cost.refiner", fmt::format("not a state: {}", error.what()));
  }
}

}  // namespace meshloom
