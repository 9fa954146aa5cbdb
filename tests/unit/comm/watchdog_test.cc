#include "meshloom/comm/watchdog.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <future>
#include <sstream>
#include <thread>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace {

using std::chrono::milliseconds;

// Only a hang reaches it.
constexpr std::chrono::seconds kHangLimit{60};
constexpr milliseconds kWatchPatience{30};

Label forward() {
  Label label;
  label.step = 12;
  label.instruction = "forward";
  label.slot = 3;
  label.unit = 7;
  label.samples = {4, 9};
  return label;
}

TEST(Label, ReadsAsASentence) {
  EXPECT_EQ(to_string(Label()), "");
  EXPECT_EQ(to_string(forward()), "step 12 forward slot 3 unit 7 samples 4, 9");
  Label packed;
  for (int i = 0; i < 11; ++i) packed.samples.push_back(i);
  EXPECT_EQ(to_string(packed), "samples 0, 1, 2, 3, 4, 5, 6, 7 and 3 more");
}

TEST(Label, IsPartOfRecordsAndErrors) {
  auto world = make_thread_world(2, {.timeout = kHangLimit});
  world[0].recorder().set_label(forward());
  world[0].recorder().set_context("warming up");
  auto tensor = at::zeros({4});
  auto work = world[0].all_reduce_(tensor);
  world[0].recorder().set_label({});
  try {
    work.wait(kWatchPatience);
    FAIL() << "expected Timeout";
  } catch (const Timeout& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("call 0, in step 12 forward slot 3 unit 7 samples 4, 9, warming up)"),
              std::string::npos)
        << text;
  }
  const auto records = world[0].recorder().records();
  ASSERT_EQ(records.size(), 1U);
  EXPECT_EQ(records[0].label.unit, 7);
  EXPECT_EQ(records[0].label.samples, (std::vector<std::int64_t>{4, 9}));
  const auto json = world[0].recorder().to_json();
  EXPECT_NE(json.find("\"instruction\": \"forward\""), std::string::npos) << json;
}

TEST(Report, NamesWhatAllGroupsOfAWorldWaitFor) {
  auto world = make_thread_world(3, {.name = "trio", .timeout = kHangLimit});
  std::vector<std::optional<Communicator>> pairs(3);
  std::vector<std::future<void>> ranks;
  for (int r = 0; r < 3; ++r) {
    ranks.push_back(std::async(std::launch::async,
                               [&, r] { pairs[r] = world[r].split(r == 1 ? -1 : 0, r, "pair"); }));
  }
  for (auto& rank : ranks) rank.get();
  world[2].recorder().set_label(forward());
  auto tensor = at::zeros({4});
  const std::vector<Transfer> receives{{0, &tensor}};
  auto exchange = pairs[2]->send_receive({}, receives);
  auto barrier = world[2].barrier();
  // Asked of any group of the world, all are told of.
  for (const auto& report : {world[2].report(), pairs[2]->report()}) {
    EXPECT_NE(report.find("in step 12 forward slot 3 unit 7 samples 4, 9"), std::string::npos);
    EXPECT_NE(report.find("[comm.send_receive] rank 1/2 group \"pair\""), std::string::npos)
        << report;
    EXPECT_NE(report.find("[comm.barrier] rank 2/3 group \"trio\""), std::string::npos) << report;
    EXPECT_NE(report.find("missing peers: 0, 1"), std::string::npos) << report;
    EXPECT_NE(report.find("last 3 of 3 calls kept"), std::string::npos) << report;
  }
  EXPECT_NE(world[0].report().find("waits for nothing"), std::string::npos);
}

TEST(Watchdog, ReportsAHangOnce) {
  const auto folder =
      std::filesystem::temp_directory_path() / ("meshloom_watchdog_" + std::to_string(::getpid()));
  std::filesystem::create_directory(folder);
  auto world = make_thread_world(2, {.timeout = kHangLimit});
  std::promise<std::string> told;
  WatchdogOptions options;
  options.patience = kWatchPatience;
  options.on_hang = [&](const std::string& report) { told.set_value(report); };
  options.folder = folder.string();
  Watchdog watchdog(world[1], options);
  world[1].recorder().set_label(forward());
  auto tensor = at::zeros({4});
  auto work = world[1].all_reduce_(tensor);
  const auto report = told.get_future().get();
  EXPECT_NE(report.find("rank 1/2 group \"world\""), std::string::npos) << report;
  EXPECT_NE(report.find("slot 3 unit 7 samples 4, 9"), std::string::npos) << report;
  EXPECT_NE(report.find("missing peers: 0"), std::string::npos) << report;
  std::this_thread::sleep_for(2 * kWatchPatience);
  EXPECT_EQ(watchdog.reports(), 1);  // a second one would throw in the promise, too
  auto yours = at::zeros({4});
  world[0].all_reduce_(yours).wait();
  work.wait();  // late, but not wrong
  std::stringstream text;
  text << std::ifstream(folder / "hang_rank1.txt").rdbuf();
  EXPECT_EQ(text.str(), report);
  EXPECT_TRUE(std::filesystem::exists(folder / "hang_rank1.json"));
  std::filesystem::remove_all(folder);
}

TEST(Watchdog, IsQuietWhileCallsEnd) {
  auto world = make_thread_world(1, {.timeout = kHangLimit});
  std::atomic<int> told{0};
  const Watchdog watchdog(world[0], {kWatchPatience, [&](const std::string&) { ++told; }, ""});
  for (int i = 0; i < 5; ++i) {
    world[0].barrier().wait();
    std::this_thread::sleep_for(kWatchPatience / 2);
  }
  EXPECT_EQ(told, 0);
}

TEST(Watchdog, RefusesToWatchInVain) {
  auto world = make_thread_world(1);
  EXPECT_THROW(Watchdog(world[0], {kWatchPatience, nullptr, ""}), InvalidArgument);
  EXPECT_THROW(Watchdog(world[0], {milliseconds(0), [](const std::string&) {}, ""}),
               InvalidArgument);
}

}  // namespace
}  // namespace meshloom::comm
