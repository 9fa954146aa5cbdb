#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>

#include "conformance/comm_bodies.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::conformance {
namespace {

using std::chrono::milliseconds;

// Long enough that a loaded machine keeps to it, short enough for a test.
constexpr milliseconds kLimit{400};
constexpr std::chrono::seconds kPatience{20};

std::string failure_of(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  std::string text = "no error";
  try {
    body();
  } catch (const Timeout& error) {
    text = error.what();
  } catch (const CommError& error) {
    text = error.what();
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, kPatience);
  return text;
}

CallOptions limited() {
  CallOptions options;
  options.timeout = kLimit;
  return options;
}

void a_missing_rank_is_named(Communicator& comm) {
  if (comm.size() == 1) return;
  auto victim = comm.split(0, comm.rank(), "victim");
  if (comm.rank() != 0) {
    auto tensor = at::zeros({4});
    const auto text = failure_of([&] { victim->all_reduce_(tensor, {}, limited()).wait(); });
    EXPECT_NE(text.find("[comm.all_reduce] rank "), std::string::npos) << text;
    EXPECT_NE(text.find("group \"victim\""), std::string::npos) << text;
    EXPECT_NE(text.find("not finished within 0.400 s; missing peers: 0"), std::string::npos)
        << text;
    // The group is gone for good, at once.
    EXPECT_NE(failure_of([&] { victim->barrier().wait(); }), "no error");
  }
  comm.barrier().wait();
}

void a_limit_can_be_given_to_wait(Communicator& comm) {
  if (comm.size() == 1) return;
  auto victim = comm.split(0, comm.rank(), "victim");
  if (comm.rank() == 0) {
    auto tensor = at::zeros({4});
    const std::vector<Transfer> receives{{comm.size() - 1, &tensor}};
    auto work = victim->send_receive({}, receives);
    EXPECT_FALSE(work.done());
    const auto text = failure_of([&] { work.wait(milliseconds(50)); });
    EXPECT_NE(text.find("[comm.send_receive]"), std::string::npos) << text;
    EXPECT_NE(text.find("missing peers: " + std::to_string(comm.size() - 1)), std::string::npos)
        << text;
    EXPECT_TRUE(work.done());
  }
  comm.barrier().wait();
}

void an_abort_reaches_all_ranks(Communicator& comm) {
  auto victim = comm.split(0, comm.rank(), "victim");
  auto child = victim->split(0, comm.rank(), "child");
  comm.barrier().wait();  // everybody has both groups
  if (comm.rank() == comm.size() - 1) {
    victim->abort("tired of it");
  }
  for (auto* group : {&*victim, &*child}) {
    const auto text = failure_of([&] { group->barrier(limited()).wait(); });
    EXPECT_NE(text.find("tired of it"), std::string::npos) << text;
  }
  victim->abort("again");
  comm.barrier().wait();
}

void ranks_that_disagree_are_told(Communicator& comm) {
  if (comm.size() == 1) return;
  auto sizes = comm.split(0, comm.rank(), "sizes");
  auto tensor = at::zeros({comm.rank() == 0 ? 4 : 5});
  EXPECT_NE(failure_of([&] { sizes->all_reduce_(tensor, {}, limited()).wait(); }), "no error");
  auto kinds = comm.split(0, comm.rank(), "kinds");
  auto same = at::zeros({4});
  EXPECT_NE(failure_of([&] {
              if (comm.rank() == 0) {
                kinds->broadcast_(same, 1, limited()).wait();
              } else {
                kinds->all_reduce_(same, {}, limited()).wait();
              }
            }),
            "no error");
  auto rows = comm.split(0, comm.rank(), "rows");
  const std::vector<std::int64_t> one(comm.size(), 1);
  std::vector<std::int64_t> expected = one;
  if (comm.rank() == 0) expected.back() = 2;
  const auto send = at::zeros({comm.size()});
  const auto text = failure_of([&] { rows->all_to_all(send, one, expected, limited()).wait(); });
  if (comm.rank() == 0) {
    EXPECT_NE(text, "no error");
  }
  auto messages = comm.split(0, comm.rank(), "messages");
  if (comm.rank() < 2) {
    auto block = at::zeros({comm.rank() == 0 ? 6 : 3});
    const std::vector<Transfer> transfers{{1 - comm.rank(), &block}};
    const auto mine =
        comm.rank() == 0 ? std::span<const Transfer>(transfers) : std::span<const Transfer>();
    const auto theirs =
        comm.rank() == 0 ? std::span<const Transfer>() : std::span<const Transfer>(transfers);
    const auto said = failure_of([&] { messages->send_receive(mine, theirs, limited()).wait(); });
    if (comm.rank() == 1) {
      EXPECT_NE(said, "no error");
    }
  }
  auto names = failure_of([&] {
    auto group = comm.split(0, comm.rank(), "names");
    (void)group->split(0, 0, comm.rank() == 0 ? "this" : "that");
  });
  EXPECT_NE(names, "no error");
  comm.barrier().wait();
}

}  // namespace

std::vector<Body> failure_bodies() {
  return {
      {"AMissingRankIsNamed", a_missing_rank_is_named},
      {"ALimitCanBeGivenToWait", a_limit_can_be_given_to_wait},
      {"AnAbortReachesAllRanks", an_abort_reaches_all_ranks},
      {"RanksThatDisagreeAreTold", ranks_that_disagree_are_told},
  };
}

}  // namespace meshloom::comm::conformance
