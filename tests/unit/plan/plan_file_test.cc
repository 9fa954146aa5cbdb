#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "meshloom/core/error.h"
#include "support.h"

namespace meshloom::plan {
namespace {

class PlanFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "meshloom.XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path folder_;
};

TEST_F(PlanFileTest, SavesAndLoadsAndLeavesNothingElse) {
  const auto path = (folder_ / "plan.json").string();
  const StepPlan plan = testing::hand_made_plan();
  plan.save(path);
  plan.save(path);  // replaces
  EXPECT_EQ(StepPlan::load(path), plan);
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) files += entry.exists();
  EXPECT_EQ(files, 1U);
}

TEST_F(PlanFileTest, ErrorsNameTheFile) {
  const auto missing = (folder_ / "none" / "plan.json").string();
  const auto text_of = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THROW((void)StepPlan::load(missing), IoError);
  EXPECT_THROW(testing::hand_made_plan().save(missing), IoError);
  EXPECT_THROW((void)StepPlan::load(folder_.string()), IoError);  // a folder
  EXPECT_NE(text_of([&] { (void)StepPlan::load(missing); }).find(missing), std::string::npos);
  EXPECT_NE(text_of([&] { testing::hand_made_plan().save(missing); }).find(missing),
            std::string::npos);
  const auto broken = (folder_ / "broken.json").string();
  std::ofstream(broken) << "{\"format\": ";
  EXPECT_THROW((void)StepPlan::load(broken), PlanError);
  EXPECT_NE(text_of([&] { (void)StepPlan::load(broken); }).find(broken), std::string::npos);
}

TEST_F(PlanFileTest, FailedSaveLeavesNoTraces) {
  const auto path = (folder_ / "plan.json").string();
  const StepPlan plan = testing::hand_made_plan();
  plan.save(path);
  std::filesystem::create_directory(folder_ / "taken");
  // Renaming a file over a folder fails after everything was written.
  EXPECT_THROW(plan.save((folder_ / "taken").string()), IoError);
  EXPECT_EQ(StepPlan::load(path), plan);
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) files += entry.exists();
  EXPECT_EQ(files, 2U);
}

}  // namespace
}  // namespace meshloom::plan
