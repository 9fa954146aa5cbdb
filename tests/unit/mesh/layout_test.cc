#include "meshloom/mesh/layout.h"

#include <gtest/gtest.h>

#include <string>

#include "meshloom/core/error.h"

namespace meshloom {
namespace {

std::string refusal(const Layout& layout) {
  try {
    layout.validate();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(Layout, TensorRanksAreFastestPipelineSlowest) {
  const Layout layout{.tp = 2, .hdp = 3, .pp = 2};
  EXPECT_EQ(layout.world_size(), 12);
  EXPECT_EQ(layout.coordinates(0), (Coordinates{0, 0, 0}));
  EXPECT_EQ(layout.coordinates(1), (Coordinates{1, 0, 0}));
  EXPECT_EQ(layout.coordinates(2), (Coordinates{0, 1, 0}));
  EXPECT_EQ(layout.coordinates(6), (Coordinates{0, 0, 1}));
  for (int rank = 0; rank < layout.world_size(); ++rank) {
    EXPECT_EQ(layout.rank(layout.coordinates(rank)), rank);
  }
}

TEST(Layout, RankOutsideTheWorldIsRefused) {
  const Layout layout{.hdp = 4};
  EXPECT_THROW((void)layout.coordinates(4), InvalidArgument);
  EXPECT_THROW((void)layout.coordinates(-1), InvalidArgument);
  EXPECT_THROW((void)layout.rank({.hdp = 4}), InvalidArgument);
}

TEST(Layout, InvalidSizeNamesTheField) {
  EXPECT_NE(refusal({.tp = 0}).find("tp is 0"), std::string::npos);
  EXPECT_NE(refusal({.hdp = -3}).find("hdp is -3"), std::string::npos);
  EXPECT_NE(refusal({.chunks = 0}).find("chunks is 0"), std::string::npos);
  EXPECT_NE(refusal({.hdp = 6, .ep = 4}).find("nearest: 3 and 6"), std::string::npos);
  EXPECT_NE(refusal({.hdp = 1 << 20, .pp = 1 << 20}).find("tp * hdp * pp"), std::string::npos);
  EXPECT_EQ(refusal({.tp = 2, .hdp = 6, .pp = 3, .ep = 3, .chunks = 2}), "");
}

TEST(Layout, TextReadsBack) {
  const Layout layout{.tp = 2, .hdp = 12, .pp = 3, .ep = 4, .chunks = 2};
  EXPECT_EQ(Layout::parse(layout.to_string()), layout);
  EXPECT_EQ(Layout::parse(""), Layout{});
  EXPECT_EQ(Layout::parse("hdp=4,tp=2"), (Layout{.tp = 2, .hdp = 4}));
}

TEST(Layout, JunkTextIsRefused) {
  for (const char* bad : {"hdp", "hdp=", "hdp=x", "hdp=4x", "hdp=0", "dp=2", "hdp=2,", ",",
                          "hdp=2,hdp=2", "hdp=99999999999", "hdp=-1", "hdp=4,ep=3", "hdp = 4"}) {
    EXPECT_THROW((void)Layout::parse(bad), InvalidArgument) << bad;
  }
}

}  // namespace
}  // namespace meshloom
