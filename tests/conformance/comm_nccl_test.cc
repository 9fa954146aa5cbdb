// The NCCL backend's logic, over a mocked NCCL and a device whose memory is the host's.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>

#include "comm/backends/nccl/nccl_engine.h"
#include "conformance/comm_bodies.h"
#include "conformance/nccl_mock.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::conformance {
namespace {

using std::chrono::milliseconds;

// Only a hang reaches it.
constexpr std::chrono::seconds kTimeout{60};
constexpr milliseconds kShort{200};
// What takes no time may wait for a core on a loaded machine.
constexpr double kAtOnceSeconds = 2.0;

struct NcclJob {
  std::shared_ptr<mock::Nccl> nccl = std::make_shared<mock::Nccl>();
  GroupOptions options{.timeout = kTimeout};
  NcclOptions limits;
  std::vector<std::shared_ptr<mock::Device>> devices;

  void run(int size, const std::function<void(Communicator&)>& body) {
    for (int r = 0; r < size; ++r) devices.push_back(std::make_shared<mock::Device>());
    run_thread_ranks(size,
                     [&](Communicator host) {
                       auto comm = detail::make_nccl_world(nccl, devices[host.rank()], host,
                                                           options, limits);
                       body(comm);
                     },
                     {.timeout = kTimeout});
  }
};

std::string failure_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

double seconds_of(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class NcclBody : public ::testing::Test {
 public:
  NcclBody(Body body, int size) : body_(std::move(body)), size_(size) {}
  void TestBody() override {
    NcclJob setup;
    setup.run(size_, [&](Communicator& comm) { body_.run(comm); });
    for (int r = 0; r < size_; ++r) {
      EXPECT_EQ(setup.nccl->count(r, ": abort"), 0);
      EXPECT_EQ(setup.nccl->count(r, ": made"), setup.nccl->count(r, ": destroy"));
    }
  }

 private:
  Body body_;
  int size_;
};

TEST(NcclWorld, NamesAndCtaLimitsReachNccl) {
  NcclJob setup;
  setup.options.name = "train";
  setup.limits.default_ctas = {1, 16};
  setup.limits.ctas["train.messages"] = {4, 8};
  setup.run(2, [](Communicator& comm) { (void)comm.split(0, 0, "gradients"); });
  EXPECT_EQ(setup.nccl->count(1, "train.messages: made, CTAs 4 to 8"), 1);
  EXPECT_EQ(setup.nccl->count(1, "train: made, CTAs 1 to 16"), 1);
  EXPECT_EQ(setup.nccl->count(1, "gradients: made, CTAs 1 to 16"), 1);
}

TEST(NcclWorld, EvenRowsTakeOneCallUnevenOnesAGroup) {
  NcclJob setup;
  setup.run(2, [](Communicator& comm) {
    const std::vector<std::int64_t> even{3, 3};
    const std::vector<std::int64_t> uneven{1, 2};
    (void)comm.all_gather(at::zeros({3, 2}), even).result();
    (void)comm.reduce_scatter(at::zeros({6, 2}), even).result();
    (void)comm.all_gather(at::zeros({comm.rank() + 1, 2}), uneven).result();
    (void)comm.reduce_scatter(at::zeros({3, 2}), uneven).result();
  });
  EXPECT_EQ(setup.nccl->count(0, "world: all_gather 24 Byte"), 1);
  EXPECT_EQ(setup.nccl->count(0, "world: reduce_scatter 6 Float"), 1);
  EXPECT_EQ(setup.nccl->count(0, "world: broadcast of 0, 8 Byte, grouped"), 1);
  EXPECT_EQ(setup.nccl->count(0, "world: broadcast of 1, 16 Byte, grouped"), 1);
  EXPECT_EQ(setup.nccl->count(0, "world: reduce to 0, 2 Float, grouped"), 1);
  EXPECT_EQ(setup.nccl->count(0, "world: reduce to 1, 4 Float, grouped"), 1);
}

TEST(NcclWorld, MessagesOfAllGroupsShareTheWorldsCommunicator) {
  NcclJob setup;
  setup.run(4, [](Communicator& comm) {
    auto half = comm.split(comm.rank() % 2, comm.rank(), "half");
    auto out = at::full({4}, comm.rank(), at::kInt);
    auto in = at::zeros({4}, at::kInt);
    const std::vector<Transfer> sends{{1 - half->rank(), &out}};
    const std::vector<Transfer> receives{{1 - half->rank(), &in}};
    half->send_receive(sends, receives).wait();
    EXPECT_EQ(in[0].item<int>(), (comm.rank() + 2) % 4);
  });
  EXPECT_EQ(setup.nccl->count(1, "world.messages: send 3, 16 Byte, grouped"), 1);
  EXPECT_EQ(setup.nccl->count(1, "world.messages: receive 3, 16 Byte, grouped"), 1);
}

TEST(NcclWorld, TensorsAreKeptForTheStream) {
  NcclJob setup;
  setup.run(1, [](Communicator& comm) {
    auto tensor = at::zeros({4});
    comm.all_reduce_(tensor).wait();
  });
  EXPECT_GT(setup.devices[0]->kept, 0);
}

TEST(NcclWorld, AStartThatHangsTimesOut) {
  NcclJob setup;
  setup.nccl->init_hangs = true;
  setup.options.timeout = kShort;
  try {
    setup.run(2, [](Communicator&) {});
    FAIL() << "expected Timeout";
  } catch (const Timeout& error) {
    EXPECT_TRUE(contains(error.what(), "making the communicator: not ready within 0.2"))
        << error.what();
    EXPECT_TRUE(contains(error.what(), "group \"world\"")) << error.what();
  }
  EXPECT_EQ(setup.nccl->count(0, "world.messages: abort"), 1);
}

TEST(NcclWorld, WhatIsTooOldOrAskedForInVainIsNamed) {
  NcclJob setup;
  setup.nccl->reported_version = 21602;
  EXPECT_THROW(setup.run(1, [](Communicator&) {}), NotSupported);
  NcclJob ordered;
  ordered.options.deterministic = true;
  EXPECT_THROW(ordered.run(1, [](Communicator&) {}), NotSupported);
}

TEST(NcclWorld, TheBudgetOfCommunicatorsIsKept) {
  NcclJob setup;
  setup.limits.max_communicators = 3;
  setup.run(2, [](Communicator& comm) {
    auto first = comm.split(0, 0, "first");
    const auto text = failure_of([&] { (void)comm.split(0, 0, "second"); });
    EXPECT_TRUE(contains(text, "\"second\" would be communicator 4")) << text;
    EXPECT_TRUE(contains(text, "world.messages, world, first")) << text;
    comm.barrier().wait();  // usable as before
  });
}

TEST(NcclWorld, AnAsynchronousErrorEndsTheCallsOfAllRanks) {
  NcclJob setup;
  setup.run(3, [&](Communicator& comm) {
    auto victim = comm.split(0, 0, "victim");
    comm.barrier().wait();
    auto tensor = at::zeros({4});
    std::string text;
    if (comm.rank() == 1) {
      const std::lock_guard lock(setup.nccl->faults);
      setup.nccl->async_errors[1] = detail::NcclResult::kRemoteError;
    }
    if (comm.rank() != 2) {  // rank 2 does not come, so that the call hangs
      text = failure_of([&] { victim->all_reduce_(tensor).wait(); });
      EXPECT_TRUE(contains(text, "[comm.all_reduce] rank ")) << text;
      EXPECT_TRUE(
          contains(text, "rank 1: communicator \"victim\": NCCL says remote error (code 6)"))
          << text;
    } else {
      while (victim->aborted().empty()) std::this_thread::sleep_for(milliseconds(1));
      text = failure_of([&] { victim->barrier().wait(); });
      EXPECT_TRUE(contains(text, "remote error")) << text;
    }
    {
      const std::lock_guard lock(setup.nccl->faults);
      setup.nccl->async_errors.clear();
    }
  });
  for (int r = 0; r < 3; ++r) EXPECT_EQ(setup.nccl->count(r, "victim: abort"), 1) << r;
}

TEST(NcclWorld, AbortDoesNotWaitForNccl) {
  NcclJob setup;
  setup.nccl->abort_takes_ms = 1'500;
  setup.run(2, [](Communicator& comm) {
    auto victim = comm.split(0, 0, "victim");
    Work work;
    auto tensor = at::zeros({4});
    if (comm.rank() == 0) work = victim->all_reduce_(tensor);
    comm.barrier().wait();
    if (comm.rank() == 0) {
      EXPECT_LT(seconds_of([&] { victim->abort("tired of it"); }), 1.0);
      EXPECT_TRUE(work.done());
      EXPECT_TRUE(contains(failure_of([&] { work.wait(); }), "tired of it"));
    } else {
      // Told over the host.
      EXPECT_LT(seconds_of([&] {
                  while (victim->aborted().empty()) std::this_thread::sleep_for(milliseconds(1));
                }),
                kAtOnceSeconds);
    }
    EXPECT_EQ(comm.aborted(), "");
    comm.barrier().wait();
  });
}

TEST(NcclWorld, ATimeLimitAbortsTheCommunicator) {
  NcclJob setup;
  setup.run(2, [](Communicator& comm) {
    auto victim = comm.split(0, 0, "victim");
    if (comm.rank() == 0) {
      CallOptions options;
      options.timeout = kShort;
      auto tensor = at::zeros({4});
      const auto text = failure_of([&] { victim->all_reduce_(tensor, {}, options).wait(); });
      EXPECT_TRUE(contains(text, "not finished within 0.200 s")) << text;
    }
    comm.barrier().wait();
  });
  EXPECT_EQ(setup.nccl->count(0, "victim: abort"), 1);
}

TEST(NcclWorld, AHangingMessageEndsTheMessagesOfAllGroups) {
  NcclJob setup;
  setup.run(2, [](Communicator& comm) {
    auto victim = comm.split(0, 0, "victim");
    auto tensor = at::zeros({4});
    const std::vector<Transfer> pieces{{1, &tensor}};
    if (comm.rank() == 0) {
      auto work = victim->send_receive(pieces, {});
      victim->abort("tired of it");
      EXPECT_TRUE(contains(failure_of([&] { work.wait(); }), "tired of it"));
      // At once, for whoever comes later, and not as if it had arrived.
      const auto text = failure_of([&] { comm.send_receive(pieces, {}).wait(); });
      EXPECT_TRUE(contains(text, "communicator \"world.messages\" is gone")) << text;
    }
    comm.barrier().wait();  // collectives have communicators of their own
  });
  EXPECT_EQ(setup.nccl->count(0, "world.messages: abort"), 1);
}

TEST(NcclWorld, ErrorsAtTheCallAreNamedWithTheirCode) {
  NcclJob setup;
  setup.nccl->failures[{0, "broadcast"}] = detail::NcclResult::kInvalidUsage;
  setup.run(2, [](Communicator& comm) {
    auto victim = comm.split(0, 0, "victim");
    comm.barrier().wait();
    auto tensor = at::zeros({4});
    const auto text = failure_of([&] { victim->broadcast_(tensor, 0).wait(); });
    EXPECT_TRUE(contains(text, "[comm.broadcast] rank ")) << text;
    EXPECT_TRUE(contains(text, "NCCL says invalid usage (code 5): mocked")) << text;
    comm.barrier().wait();
  });
}

TEST(NcclWorld, AnErrorOfTheDeviceEndsItsCalls) {
  NcclJob setup;
  setup.run(2, [&](Communicator& comm) {
    auto victim = comm.split(0, 0, "victim");
    comm.barrier().wait();
    if (comm.rank() == 0) {
      auto tensor = at::zeros({4});
      auto work = victim->all_reduce_(tensor);
      setup.devices[0]->broken = true;
      const auto text = failure_of([&] { work.wait(); });
      setup.devices[0]->broken = false;
      EXPECT_TRUE(contains(text, "device 0: cudaEventQuery failed")) << text;
    }
    comm.barrier().wait();
  });
}

}  // namespace
}  // namespace meshloom::comm::conformance

int main(int argc, char** argv) {
  namespace conformance = meshloom::comm::conformance;
  ::testing::InitGoogleTest(&argc, argv);
  for (const int size : {1, 2, 3, 4}) {
    for (const auto& bodies : {conformance::shape_bodies(), conformance::data_bodies()}) {
      for (const auto& body : bodies) {
        ::testing::RegisterTest(("NcclWorldOf" + std::to_string(size)).c_str(), body.name.c_str(),
                                nullptr, nullptr, __FILE__, __LINE__,
                                [body, size]() -> ::testing::Test* {
                                  return new conformance::NcclBody(body, size);  // gtest owns it
                                });
      }
    }
  }
  return RUN_ALL_TESTS();
}
