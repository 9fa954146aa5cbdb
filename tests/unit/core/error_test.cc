#include "meshloom/core/error.h"

#include <gtest/gtest.h>

#include <string>

#include "meshloom/core/check.h"

namespace meshloom {
namespace {

TEST(Error, TextIsPlaceThenSentence) {
  const CommError error("comm.all_to_all", "rank 3/8: 48 rows, expected 40");
  EXPECT_STREQ(error.what(), "[comm.all_to_all] rank 3/8: 48 rows, expected 40");
  EXPECT_EQ(error.where(), "comm.all_to_all");
  EXPECT_EQ(error.code(), ErrorCode::kComm);
  EXPECT_NE(std::string(error.location().file_name()).find("error_test.cc"), std::string::npos);
}

TEST(Error, KindsAreCaughtApartAndTogether) {
  EXPECT_THROW(throw PlanError("a", "b"), PlanError);
  EXPECT_THROW(throw PlanError("a", "b"), Error);
  EXPECT_THROW(throw Timeout("a", "b"), std::runtime_error);
}

TEST(Check, ComparisonPrintsBothSides) {
  try {
    MESHLOOM_CHECK_EQ(48, 40, "comm.all_to_all", "rows");
    FAIL() << "no throw";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "[comm.all_to_all] rows: got 48, expected == 40");
  }
  EXPECT_NO_THROW(MESHLOOM_CHECK_LT(1, 2, "x", "y"));
  EXPECT_THROW(MESHLOOM_CHECK(false, "x", "y"), InvalidArgument);
}

}  // namespace
}  // namespace meshloom
