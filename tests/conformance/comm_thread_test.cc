#include <gtest/gtest.h>

#include <chrono>
#include <utility>

#include "conformance/comm_bodies.h"
#include "meshloom/comm/backends.h"

namespace meshloom::comm::conformance {
namespace {

// Only a hang reaches it.
constexpr std::chrono::seconds kTimeout{60};

class RanksTest : public ::testing::Test {
 public:
  RanksTest(Body body, int size, bool fake) : body_(std::move(body)), size_(size), fake_(fake) {}

  void TestBody() override {
    const GroupOptions options{.timeout = kTimeout};
    if (!fake_) {
      run_thread_ranks(
          size_, [&](Communicator comm) { body_.run(comm); }, options);
      return;
    }
    const auto rule = [this](int rank, const std::string& name) {
      if (name == "parity") return std::pair(rank % 2, -rank);
      return std::pair(rank < (size_ + 1) / 2 ? 0 : -1, rank);
    };
    for (int rank = 0; rank < size_; ++rank) {
      auto comm = make_fake_world(rank, size_, options, rule);
      body_.run(comm);
    }
  }

 private:
  Body body_;
  int size_;
  bool fake_;
};

void add(const std::string& suite, const std::vector<Body>& bodies, int size, bool fake) {
  for (const Body& body : bodies) {
    ::testing::RegisterTest((suite + std::to_string(size)).c_str(), body.name.c_str(), nullptr,
                            nullptr, __FILE__, __LINE__, [=]() -> ::testing::Test* {
                              return new RanksTest(body, size, fake);  // gtest owns it
                            });
  }
}

}  // namespace
}  // namespace meshloom::comm::conformance

int main(int argc, char** argv) {
  namespace conformance = meshloom::comm::conformance;
  ::testing::InitGoogleTest(&argc, argv);
  for (const int size : {1, 2, 3, 4, 5, 8}) {
    conformance::add("ThreadWorldOf", conformance::shape_bodies(), size, false);
    conformance::add("ThreadWorldOf", conformance::data_bodies(), size, false);
    conformance::add("ThreadWorldOf", conformance::failure_bodies(), size, false);
    conformance::add("FakeWorldOf", conformance::shape_bodies(), size, true);
  }
  return RUN_ALL_TESTS();
}
