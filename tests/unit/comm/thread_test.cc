#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Far above what any of these calls take, so only a hang reaches it.
constexpr seconds kLong{60};
constexpr milliseconds kShort{50};

double elapsed(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

TEST(ThreadRanks, FirstOwnFailureIsRethrown) {
  const auto run = [] {
    run_thread_ranks(4, [](Communicator comm) {
      if (comm.rank() == 2) throw DataError("test", "rank 2 is broken");
      comm.barrier().wait();
    });
  };
  EXPECT_LT(elapsed([&] { EXPECT_THROW(run(), DataError); }), 10.0);
}

TEST(ThreadRanks, AbortReachesGroupsThatWereSplit) {
  try {
    run_thread_ranks(4, [](Communicator comm) {
      auto half = comm.split(comm.rank() % 2, 0, "half");
      if (comm.rank() == 3) throw DataError("test", "rank 3 is broken");
      if (comm.rank() == 1) {
        EXPECT_THROW(half->barrier().wait(), CommError);
      }
      comm.barrier().wait();
    });
    FAIL() << "expected DataError";
  } catch (const DataError& error) {
    EXPECT_NE(std::string(error.what()).find("rank 3 is broken"), std::string::npos);
  }
}

TEST(ThreadRanks, IntraOpThreadsAreSetPerRankAndRestored) {
  const int before = at::get_num_threads();
  std::atomic<int> wrong{0};
  run_thread_ranks(
      3, [&](Communicator) { wrong += at::get_num_threads() != 2; }, {}, 2);
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(at::get_num_threads(), before);
}

TEST(ThreadRanks, LargeReductionIsSharedByWaitingRanks) {
  run_thread_ranks(3, [](Communicator comm) {
    auto tensor = at::full({3'000'001}, comm.rank() + 1.0, at::kFloat);
    comm.all_reduce_(tensor).wait();
    EXPECT_TRUE(tensor.eq(6.0).all().item<bool>());
  });
}

TEST(ThreadGroup, TimeoutNamesOperationGroupRankAndMissingPeers) {
  auto world = make_thread_world(3, {.name = "trio", .timeout = kLong});
  CallOptions options;
  options.timeout = kShort;
  options.purpose = "gradients";
  auto tensor = at::zeros({4});
  auto work = world[1].all_reduce_(tensor, ReduceOp::kSum, options);
  EXPECT_NE(world[1].pending_report().find("missing peers: 0, 2"), std::string::npos);
  try {
    work.wait();
    FAIL() << "expected Timeout";
  } catch (const Timeout& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("[comm.all_reduce] rank 1/3 group \"trio\""), std::string::npos) << text;
    EXPECT_NE(text.find("gradients"), std::string::npos) << text;
    EXPECT_NE(text.find("0.050 s"), std::string::npos) << text;
    EXPECT_NE(text.find("missing peers: 0, 2"), std::string::npos) << text;
  }
  EXPECT_THROW(work.wait(), Timeout);
  EXPECT_THROW(world[0].barrier().wait(), CommError);
}

TEST(ThreadGroup, MissingPeersOfMessagesAreNamed) {
  auto world = make_thread_world(3, {.timeout = kLong});
  auto tensor = at::zeros({4});
  const std::vector<Transfer> receives{{2, &tensor}};
  auto work = world[0].send_receive({}, receives);
  EXPECT_NE(world[0].pending_report().find("missing peers: 2"), std::string::npos);
  EXPECT_FALSE(work.done());
  const std::vector<Transfer> sends{{0, &tensor}};
  world[2].send_receive(sends, {}).wait();
  EXPECT_TRUE(work.done());
  EXPECT_EQ(world[0].pending_report(), "");
}

TEST(ThreadGroup, DisagreementNamesBothCalls) {
  auto world = make_thread_world(2, {.timeout = kLong});
  auto a = at::zeros({4});
  auto b = at::zeros({5});
  auto first = world[0].all_reduce_(a);
  auto second = world[1].all_reduce_(b);
  for (Work* work : {&first, &second}) {
    try {
      work->wait();
      FAIL() << "expected CommError";
    } catch (const CommError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("4 elements"), std::string::npos) << text;
      EXPECT_NE(text.find("5 elements"), std::string::npos) << text;
    }
  }
}

TEST(ThreadGroup, DroppedWorkStillCompletesForOthers) {
  auto world = make_thread_world(2, {.timeout = kLong});
  auto mine = at::full({8}, 1.0);
  auto yours = at::full({8}, 2.0);
  { auto dropped = world[0].all_reduce_(mine); }
  world[1].all_reduce_(yours).wait();
  EXPECT_TRUE(mine.eq(3.0).all().item<bool>());
}

TEST(FlightRecorder, KeepsCallsOfAllGroupsInOrderWithContext) {
  auto world = make_thread_world(1, {.name = "solo", .timeout = kLong, .recorded_calls = 4});
  Communicator comm = world[0];
  comm.recorder().set_context("step 3 slot 1");
  auto tensor = at::zeros({10}, at::kDouble);
  CallOptions options;
  options.purpose = "exchange";
  comm.broadcast_(tensor, 0, options).wait();
  auto child = comm.split(0, 0, "child");
  child->barrier().wait();
  const auto records = comm.recorder().records();
  ASSERT_EQ(records.size(), 3U);
  EXPECT_EQ(records[0].operation, "broadcast");
  EXPECT_EQ(records[0].purpose, "exchange");
  EXPECT_EQ(records[0].context, "step 3 slot 1");
  EXPECT_EQ(records[0].state, OperationState::kDone);
  EXPECT_EQ(records[2].group, "child");
  EXPECT_EQ(records[2].operation, "barrier");
  EXPECT_NE(comm.recorder().to_text().find("\"child\" barrier 0"), std::string::npos);
  EXPECT_NE(comm.recorder().to_json().find("\"step 3 slot 1\""), std::string::npos);
  for (int i = 0; i < 10; ++i) comm.barrier().wait();
  EXPECT_EQ(comm.recorder().records().size(), 4U);
  EXPECT_TRUE(comm.recorder().pending().empty());
}

TEST(FakeWorld, SplitsByRule) {
  auto comm = make_fake_world(5, 8, {}, [](int rank, const std::string& name) {
    EXPECT_EQ(name, "pairs");
    return std::pair(rank / 2, -rank);
  });
  auto pair = comm.split(2, -5, "pairs");
  EXPECT_EQ(pair->size(), 2);
  EXPECT_EQ(pair->rank(), 0);
  EXPECT_THROW((void)make_fake_world(0, 2).split(0, 0, "x"), NotSupported);
}

}  // namespace
}  // namespace meshloom::comm
