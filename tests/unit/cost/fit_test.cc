#include "meshloom/cost/fit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/core/random.h"

namespace meshloom {
namespace {

constexpr CostModel kTruth{.quadratic = 3e-9, .linear = 8e-5, .fixed = 4e-3, .exchange = 2e-6};
/// Least squares on exact data: rounding of a badly conditioned 4 x 4 system.
constexpr double kExact = 1e-4;
/// What 5 % noise on some hundred units leaves in a unit's predicted time.
constexpr double kNoisy = 0.02;

struct Draw {
  std::uint64_t key;
  std::uint64_t next = 0;
  double operator()() { return random_uniform(key, next++); }
};

UnitTiming timing_of(const CostModel& model, double length, int documents, int degree) {
  UnitTiming timing;
  timing.square_sum = documents * length * length;
  timing.token_sum = documents * length;
  timing.degree = degree;
  timing.seconds =
      (model.quadratic * timing.square_sum + model.linear * timing.token_sum) / degree +
      model.fixed + model.exchange * (degree - 1) / degree * timing.token_sum;
  return timing;
}

UnitTiming random_timing(const CostModel& model, Draw& draw) {
  const double length = std::exp(4.0 + 8.0 * draw());
  const int documents = length < 5000.0 ? 1 + static_cast<int>(draw() * 6) : 1;
  const int degree = length > 20000.0 ? 2 + static_cast<int>(draw() * 7) : 1;
  return timing_of(model, length, documents, degree);
}

double error_of(const CostModel& model, const UnitTiming& timing) {
  const double work = model.quadratic * timing.square_sum + model.linear * timing.token_sum;
  const double time = work / timing.degree + model.fixed +
                      model.exchange * (timing.degree - 1) / timing.degree * timing.token_sum;
  return std::abs(time / timing.seconds - 1.0);
}

TEST(FitCost, ExactTimingsGiveTheirCoefficients) {
  Draw draw{random_key("exact", 1)};
  std::vector<UnitTiming> timings;
  for (int i = 0; i < 60; ++i) timings.push_back(random_timing(kTruth, draw));
  const CostFit fit = fit_cost(timings);
  EXPECT_NEAR(fit.model.quadratic / kTruth.quadratic, 1.0, kExact);
  EXPECT_NEAR(fit.model.linear / kTruth.linear, 1.0, kExact);
  EXPECT_NEAR(fit.model.fixed / kTruth.fixed, 1.0, kExact);
  EXPECT_NEAR(fit.model.exchange / kTruth.exchange, 1.0, kExact);
  EXPECT_EQ(fit.outliers, 0);
}

TEST(FitCost, NoiseAndOutliersAreBorne) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    Draw draw{random_key("noisy", seed)};
    std::vector<UnitTiming> timings;
    std::vector<UnitTiming> clean;
    for (int i = 0; i < 300; ++i) {
      clean.push_back(random_timing(kTruth, draw));
      timings.push_back(clean.back());
      timings.back().seconds *= 1.0 + 0.05 * (2.0 * draw() - 1.0);
      if (i % 10 == 0) timings.back().seconds *= 5.0;  // somebody else had the core
    }
    const CostFit fit = fit_cost(timings);
    EXPECT_EQ(fit.outliers, 30);
    double mean = 0.0;
    for (const UnitTiming& timing : clean) mean += error_of(fit.model, timing) / 300.0;
    EXPECT_LE(mean, kNoisy) << seed;
  }
}

TEST(FitCost, CoefficientsAreNeverNegative) {
  // Longer is relatively faster: the straight line through these has a negative square.
  std::vector<UnitTiming> timings;
  for (int i = 1; i <= 20; ++i) {
    timings.push_back(timing_of({.quadratic = 0, .linear = 1, .fixed = 0}, 100.0 * i, 1, 1));
    timings.back().seconds = std::pow(100.0 * i, 0.9);
  }
  const CostModel model = fit_cost(timings).model;
  EXPECT_GE(model.quadratic, 0.0);
  EXPECT_GT(model.linear, 0.0);
  EXPECT_NO_THROW(model.validate());
  EXPECT_EQ(model.exchange, 0.0);  // every unit has one rank
}

TEST(FitCost, ProfilesThatSayTooLittleAreRefused) {
  const auto refused = [](const std::vector<UnitTiming>& timings, const std::string& says) {
    try {
      (void)fit_cost(timings);
      ADD_FAILURE() << "accepted; expected " << says;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(says), std::string::npos) << error.what();
    }
  };
  const UnitTiming good = timing_of(kTruth, 500.0, 1, 1);
  refused({good, good, good}, "3 timings, expected at least 4");
  refused({good, good, good, good}, "too alike to tell linear from quadratic");
  UnitTiming bad = good;
  bad.seconds = 0.0;
  refused({good, bad, good, good}, "timing 1");
  bad.seconds = std::nan("");
  refused({good, good, good, bad}, "timing 3");
}

TEST(CostRefiner, FindsTheTruthFromAPriorInOtherUnits) {
  Draw draw{random_key("refine", 2)};
  CostRefiner refiner(CostModel{});  // a 7B model, quadratic 1
  for (int i = 0; i < 600; ++i) {
    UnitTiming timing = random_timing(kTruth, draw);
    timing.seconds *= 1.0 + 0.05 * (2.0 * draw() - 1.0);
    if (i % 17 == 3) timing.seconds *= 20.0;
    refiner.add(timing);
  }
  double mean = 0.0;
  for (int i = 0; i < 100; ++i)
    mean += error_of(refiner.model(), random_timing(kTruth, draw)) / 100;
  EXPECT_LE(mean, 2 * kNoisy);
  EXPECT_LE(refiner.error(), 0.1);
}

TEST(CostRefiner, FollowsAMachineThatSlowsDown) {
  Draw draw{random_key("drift", 3)};
  CostRefiner refiner(kTruth, 128.0);
  CostModel slow = kTruth;
  for (double* value : {&slow.quadratic, &slow.linear, &slow.fixed, &slow.exchange}) *value *= 1.5;
  for (int i = 0; i < 300; ++i) refiner.add(random_timing(kTruth, draw));
  for (int i = 0; i < 600; ++i) refiner.add(random_timing(slow, draw));
  double mean = 0.0;
  for (int i = 0; i < 100; ++i) mean += error_of(refiner.model(), random_timing(slow, draw)) / 100;
  EXPECT_LE(mean, 2 * kNoisy);
}

TEST(CostRefiner, WhatUnitsDoNotTellStaysWithThePrior) {
  CostRefiner refiner(CostModel{.quadratic = 2.0, .linear = 4000.0, .fixed = 0, .exchange = 10.0});
  for (int i = 0; i < 50; ++i) {  // one length alone: only a sum is known
    UnitTiming timing;
    timing.square_sum = 1000.0 * 1000.0;
    timing.token_sum = 1000.0;
    timing.seconds = 3.0;  // half of what the prior says
    refiner.add(timing);
  }
  EXPECT_NEAR(refiner.model().linear / refiner.model().quadratic, 2000.0, 100.0);
  EXPECT_NEAR(refiner.model().quadratic, 1e-6 * 3.0 / 3.0, 1e-7);
}

TEST(CostRefiner, GoesOnFromItsState) {
  Draw draw{random_key("state", 4)};
  CostRefiner refiner(kTruth);
  for (int i = 0; i < 40; ++i) refiner.add(random_timing(kTruth, draw));
  CostRefiner other = CostRefiner::from_json(refiner.to_json());
  EXPECT_EQ(other, refiner);
  const UnitTiming more = random_timing(kTruth, draw);
  refiner.add(more);
  other.add(more);
  EXPECT_EQ(other, refiner);
  EXPECT_THROW((void)CostRefiner::from_json("{}"), InvalidArgument);
  EXPECT_THROW((void)CostRefiner::from_json("["), InvalidArgument);
  UnitTiming bad = more;
  bad.degree = 0;
  EXPECT_THROW(refiner.add(bad), InvalidArgument);
  EXPECT_EQ(other, refiner);
}

}  // namespace
}  // namespace meshloom
