#include "meshloom/train/memory_report.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/train/trainer.h"
#include "tiny_run.h"
#include "train/internal/memory_check.h"
#include "unit/temporary_folder.h"

namespace meshloom::train {
namespace memory_report_tests {

MemoryReport report_of(std::int64_t needed, std::int64_t states, std::int64_t has) {
  MemoryReport report;
  report.stages = {{.rank = 0, .bytes = {}}};
  report.stages[0].bytes[0] = states;
  report.stages[0].bytes[6] = needed - states;
  report.baseline = {0};
  report.room = {.name = "host a", .ranks = 1, .needed = needed, .states = states, .has = has};
  report.changes = {{.setting = "parallel.recompute: full", .bytes = has / 2}};
  return report;
}

constexpr std::int64_t kGiB = std::int64_t{1} << 30;

TEST(MemoryReport, PoliciesRefuseWhatTheySay) {
  const MemoryReport fits = report_of(2 * kGiB, kGiB, 3 * kGiB);
  const MemoryReport may_fit = report_of(4 * kGiB, kGiB, 3 * kGiB);
  const MemoryReport never_fits = report_of(6 * kGiB, 4 * kGiB, 3 * kGiB);
  for (const char* policy : {"auto", "warn", "refuse"}) {
    EXPECT_NO_THROW(detail::check_memory(fits, policy));
  }
  EXPECT_NO_THROW(detail::check_memory(may_fit, "auto"));
  EXPECT_THROW(detail::check_memory(may_fit, "refuse"), InvalidArgument);
  EXPECT_THROW(detail::check_memory(never_fits, "auto"), InvalidArgument);
  EXPECT_NO_THROW(detail::check_memory(never_fits, "warn"));
  EXPECT_NO_THROW(detail::check_memory(report_of(6 * kGiB, kGiB, 0), "refuse"));  // unknown
}

TEST(MemoryReport, SaysWhatIsMissingAndWhatToChange) {
  const std::string text = report_of(4 * kGiB, kGiB, 3 * kGiB).text();
  for (const char* part :
       {"parameters 1.00 GiB", "attention 3.00 GiB", "host a needs up to 4.00 GiB", "has 3.00 GiB",
        "1.00 GiB are missing", "parallel.recompute: full: 1.50 GiB"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
  }
}

TEST(MemoryReport, RunFolderHasPredictedAndMeasured) {
  const TemporaryFolder folder;
  const TrainConfig config = tiny_config(folder.file("run"), 2);
  std::int64_t predicted = 0;
  comm::run_thread_ranks(2, [&](comm::Communicator world) {
    Trainer trainer(config, tiny_moe(), tiny_loader(tiny_documents()), world);
    EXPECT_TRUE(trainer.memory().fits());
    EXPECT_EQ(trainer.memory().baseline.size(), 2U);
    if (world.rank() == 0) predicted = trainer.memory().fullest().total();
    trainer.run();
  });
  std::ifstream file(folder.file("run") + "/memory.json");
  const auto json = nlohmann::json::parse(file);
  ASSERT_EQ(json.at("ranks").size(), 2U);
  for (const auto& rank : json.at("ranks")) {
    EXPECT_EQ(rank.at("predicted").get<std::int64_t>(), predicted);
    EXPECT_GE(rank.at("measured").get<std::int64_t>(), 0);
  }
  EXPECT_GT(json.at("room").at("has").get<std::int64_t>(), 0);
}

}  // namespace memory_report_tests
}  // namespace meshloom::train
