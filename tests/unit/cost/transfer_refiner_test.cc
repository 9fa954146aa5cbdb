#include "meshloom/cost/transfer_refiner.h"

#include <gtest/gtest.h>

#include <limits>

#include "meshloom/core/error.h"

namespace meshloom {
namespace {

/// 100 tokens of 50 bytes each; 1 GB/s out, 2 GB/s back.
constexpr TransferTiming kStep{.out_bytes = 2e3,
                               .out_seconds = 2e-6,
                               .back_bytes = 2e3,
                               .back_seconds = 1e-6,
                               .saved_bytes = 5e3,
                               .tokens = 100};

TEST(TransferRefiner, GivesTheTimeOfATokensActivationsByTheSlowerDirection) {
  TransferRefiner refiner;
  EXPECT_EQ(refiner.seconds_per_token(1), 0.0) << "nothing is known";
  for (int step = 0; step < 5; ++step) refiner.add(kStep);
  EXPECT_NEAR(refiner.seconds_per_token(1), 50e-9, 1e-15);
  EXPECT_NEAR(refiner.seconds_per_token(4), 12.5e-9, 1e-15);
  TransferRefiner slow_back;
  slow_back.add({2e3, 2e-6, 2e3, 4e-6, 5e3, 100});
  EXPECT_NEAR(slow_back.seconds_per_token(1), 100e-9, 1e-15);
}

TEST(TransferRefiner, RecentStepsCountMost) {
  TransferRefiner refiner;
  for (int step = 0; step < 50; ++step) refiner.add(kStep);
  for (int step = 0; step < 100; ++step) refiner.add({2e3, 6e-6, 2e3, 1e-6, 5e3, 100});
  EXPECT_NEAR(refiner.seconds_per_token(1), 150e-9, 1e-9);
}

TEST(TransferRefiner, StepsThatMovedNothingTellHowMuchThereIsToMove) {
  TransferRefiner refiner;
  refiner.add({.saved_bytes = 5e3, .tokens = 100});
  EXPECT_EQ(refiner.seconds_per_token(1), 0.0);
  refiner.add(kStep);
  EXPECT_NEAR(refiner.seconds_per_token(1), 50e-9, 1e-15);
}

TEST(TransferRefiner, StateSurvivesText) {
  TransferRefiner refiner;
  refiner.add(kStep);
  refiner.add({2e3, 6e-6, 2e3, 1e-6, 5e3, 100});
  EXPECT_EQ(TransferRefiner::from_json(refiner.to_json()), refiner);
  for (const char* bad : {"", "{}", R"({"format": "another"})", "[1]",
                          R"({"format": "meshloom.transfer_refiner/1", "out_bytes": -1})"}) {
    EXPECT_THROW((void)TransferRefiner::from_json(bad), InvalidArgument) << bad;
  }
}

TEST(TransferRefiner, FiguresThatCannotBeAreRefused) {
  TransferRefiner refiner;
  refiner.add(kStep);
  const TransferRefiner before = refiner;
  for (const double bad :
       {-1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    TransferTiming timing = kStep;
    timing.back_seconds = bad;
    EXPECT_THROW(refiner.add(timing), InvalidArgument);
  }
  EXPECT_EQ(refiner, before);
}

}  // namespace
}  // namespace meshloom
