#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <chrono>
#include <optional>
#include <utility>

#include "conformance/comm_bodies.h"
#include "meshloom/comm/backends.h"

namespace meshloom::comm::conformance {
namespace {

// Only a hang reaches it.
constexpr std::chrono::seconds kTimeout{60};

class WorldTest : public ::testing::Test {
 public:
  WorldTest(Body body, Communicator* world) : body_(std::move(body)), world_(world) {}
  void TestBody() override { body_.run(*world_); }

 private:
  Body body_;
  Communicator* world_;
};

}  // namespace
}  // namespace meshloom::comm::conformance

// Every rank runs every test in the same order; one failed rank fails the program on all.
int main(int argc, char** argv) {
  namespace comm = meshloom::comm;
  namespace conformance = meshloom::comm::conformance;
  ::testing::InitGoogleTest(&argc, argv);
  auto world = comm::make_mpi_world({.timeout = conformance::kTimeout});
  if (world.rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
  }
  for (const auto& bodies :
       {conformance::shape_bodies(), conformance::data_bodies(), conformance::failure_bodies()}) {
    for (const auto& body : bodies) {
      ::testing::RegisterTest("MpiWorld", body.name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
                              [body, &world]() -> ::testing::Test* {
                                return new conformance::WorldTest(body, &world);  // gtest owns it
                              });
    }
  }
  auto result = at::full({1}, RUN_ALL_TESTS() == 0 ? 0 : 1, at::kInt);
  world.all_reduce_(result, comm::ReduceOp::kMax).wait();
  return result[0].item<int>();
}
