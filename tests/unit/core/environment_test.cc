#include "meshloom/core/environment.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "meshloom/core/error.h"

namespace meshloom {
namespace {

class EnvironmentTest : public ::testing::Test {
 protected:
  void TearDown() override { ::unsetenv("MESHLOOM_TIMEOUT_SECONDS"); }
};

TEST_F(EnvironmentTest, TimeoutIsReadInSeconds) {
  ::setenv("MESHLOOM_TIMEOUT_SECONDS", "1.5", 1);
  EXPECT_EQ(Environment::from_process().timeout, std::chrono::milliseconds(1500));
}

TEST_F(EnvironmentTest, BadTimeoutNamesTheVariable) {
  for (const char* bad : {"soon", "-1", "0", "1e99", "5s"}) {
    ::setenv("MESHLOOM_TIMEOUT_SECONDS", bad, 1);
    try {
      (void)Environment::from_process();
      FAIL() << bad;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("MESHLOOM_TIMEOUT_SECONDS"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace meshloom
