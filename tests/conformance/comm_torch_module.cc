// The conformance suite over a torch.distributed process group, as a module that a script started
// by torchrun imports.
#include <gtest/gtest.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "conformance/comm_bodies.h"
#include "failure/comm_deaths.h"
#include "meshloom/comm/torch_backend.h"

namespace meshloom::comm::conformance {
namespace {

// Only a hang reaches it.
constexpr std::chrono::seconds kTimeout{60};

class TorchWorldTest : public ::testing::Test {
 public:
  TorchWorldTest(Body body, Communicator* world) : body_(std::move(body)), world_(world) {}
  void TestBody() override { body_.run(*world_); }

 private:
  Body body_;
  Communicator* world_;
};

// 0 if all tests of this rank passed.
int run_all(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  int argc = 1;
  char name[] = "comm_conformance_torch";
  char* argv[] = {name, nullptr};
  ::testing::InitGoogleTest(&argc, argv);
  auto world = make_torch_world(group, {.timeout = kTimeout});
  if (world.rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
  }
  for (const auto& bodies : {shape_bodies(), data_bodies(), failure_bodies()}) {
    for (const auto& body : bodies) {
      ::testing::RegisterTest("TorchWorld", body.name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
                              [body, &world]() -> ::testing::Test* {
                                return new TorchWorldTest(body, &world);  // gtest owns it
                              });
    }
  }
  return RUN_ALL_TESTS();
}

// The exit code of a rank of a job that breaks.
int run_death(const c10::intrusive_ptr<c10d::ProcessGroup>& group, const std::string& mode,
              double limit_seconds) {
  const auto limit = std::chrono::milliseconds(static_cast<int>(1000 * limit_seconds));
  auto world = make_torch_world(group, {.timeout = limit});
  return deaths::run(world, mode);
}

}  // namespace
}  // namespace meshloom::comm::conformance

PYBIND11_MODULE(comm_conformance_torch, module) {
  module.def("run_all", &meshloom::comm::conformance::run_all,
             pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("run_death", &meshloom::comm::conformance::run_death,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}
