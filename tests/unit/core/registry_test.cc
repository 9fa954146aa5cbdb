#include "meshloom/core/registry.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>

namespace meshloom {
namespace {

struct Shape {
  virtual ~Shape() = default;
  [[nodiscard]] virtual int corners() const = 0;
};
struct Polygon final : Shape {
  explicit Polygon(int n) : n_(n) {}
  [[nodiscard]] int corners() const override { return n_; }
  int n_;
};

TEST(Registry, CreatesWithTheGivenArguments) {
  Registry<Shape, int> registry("shape");
  registry.add("polygon", [](int n) { return std::make_shared<Polygon>(n); });
  EXPECT_EQ(registry.create("polygon", 5)->corners(), 5);
}

TEST(Registry, UnknownNameListsKnownOnes) {
  Registry<Shape> registry("shape");
  registry.add("square", [] { return std::make_shared<Polygon>(4); });
  registry.add("cube", [] { return std::make_shared<Polygon>(8); });
  try {
    (void)registry.create("circle");
    FAIL() << "no throw";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "[shape] unknown name \"circle\"; known: cube, square");
  }
}

TEST(Registry, TakenNameLeavesTheFirst) {
  Registry<Shape> registry("shape");
  registry.add("square", [] { return std::make_shared<Polygon>(4); });
  EXPECT_THROW(registry.add("square", [] { return std::make_shared<Polygon>(5); }),
               InvalidArgument);
  EXPECT_EQ(registry.create("square")->corners(), 4);
  EXPECT_EQ(registry.names(), std::vector<std::string>{"square"});
}

}  // namespace
}  // namespace meshloom
