// What a run leaves behind when a rank hangs, fails or is asked.

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/train/trainer.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train::run_watch {
namespace {

using plan::Op;

/// Patience of the watchdog, and a stop that outlasts it on a loaded machine.
constexpr double kPatience = 0.1;
constexpr std::chrono::milliseconds kStop{1500};
/// Until a report that was asked for has been written, on a loaded machine.
constexpr std::chrono::seconds kAnswer{20};

std::string slurp(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string flight(const TemporaryFolder& folder, int rank) {
  return slurp(folder.file("run/flight/rank-0000" + std::to_string(rank) + ".txt"));
}

/// Documents that every rank shares, so that all meet in every slot.
std::vector<data::Document> long_documents() {
  std::vector<data::Document> result(20);
  for (auto& document : result) document.tokens.assign(128, 3);
  return result;
}

TEST(RunWatch, HangNamesPlaceAndPeers) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 2);
  config.watchdog_seconds = kPatience;
  config.capacity_tokens = 64;  // no rank holds a document alone
  std::mutex mutex;
  std::string reports;
  comm::run_thread_ranks(2, [&](comm::Communicator world) {
    TrainerHooks hooks;
    bool stopped = false;
    hooks.before = [&](const plan::Instruction& instruction) {
      if (world.rank() != 1 || instruction.op != Op::kForward || stopped) return;
      stopped = true;
      std::this_thread::sleep_for(kStop);
    };
    hooks.on_hang = [&](const std::string& report) {
      const std::lock_guard lock(mutex);
      if (world.rank() == 0) reports += report;
    };
    Trainer trainer(config, tiny_dense(), tiny_loader(long_documents()), world, nullptr, hooks);
    trainer.run();  // late, but not wrong
  });
  for (const char* part :
       {"in step 0 forward slot 0 unit 0 samples ", "[comm.send_receive] rank 0/2",
        "purpose exchange", "missing peers: 1"}) {
    EXPECT_NE(reports.find(part), std::string::npos) << part << " in: " << reports;
    EXPECT_NE(flight(folder, 0).find(part), std::string::npos) << part;
  }
  EXPECT_NE(flight(folder, 0).find("Z: a call is pending for more than 0.1 s"), std::string::npos);
}

TEST(RunWatch, QuietRunsLeaveNoFiles) {
  const TemporaryFolder folder;
  comm::run_thread_ranks(2, [&](comm::Communicator world) {
    Trainer trainer(tiny_config(folder.file("run"), 2), tiny_dense(), tiny_loader(), world);
    trainer.run();
  });
  EXPECT_TRUE(flight(folder, 0).empty());
  EXPECT_TRUE(flight(folder, 1).empty());
}

TEST(RunWatch, FailureInAnyPhaseIsWrittenByEveryRank) {
  for (const Op phase : {Op::kLoad, Op::kForward, Op::kBackward, Op::kReduce, Op::kStep}) {
    const TemporaryFolder folder;
    std::vector<std::string> errors(3);
    EXPECT_THROW(comm::run_thread_ranks(
                     3,
                     [&](comm::Communicator world) {
                       TrainerHooks hooks;
                       int steps = 0;
                       hooks.before = [&](const plan::Instruction& at) {
                         if (at.op != phase || world.rank() != 2) return;
                         if (++steps > 2) throw DataError("test", "planted");
                       };
                       Trainer trainer(tiny_config(folder.file("run"), 6), tiny_dense(),
                                       tiny_loader(long_documents()), world, nullptr, hooks);
                       try {
                         trainer.run();
                       } catch (const std::exception& error) {
                         errors[static_cast<std::size_t>(world.rank())] = error.what();
                         throw;
                       }
                     }),
                 DataError);
    for (int rank = 0; rank < 3; ++rank) {
      const std::string& error = errors[static_cast<std::size_t>(rank)];
      const std::string name(plan::to_string(phase));
      for (const std::string& part :
           {std::string("rank 2/3 in step "), ", " + name, std::string("planted")}) {
        EXPECT_NE(error.find(part), std::string::npos) << rank << ": " << part << " in " << error;
        EXPECT_NE(flight(folder, rank).find(part), std::string::npos)
            << rank << ": " << part << " in " << flight(folder, rank);
      }
      EXPECT_NE(flight(folder, rank).find("all calls kept, oldest first:\n#"), std::string::npos);
    }
  }
}

TEST(RunWatch, ReportsAreWrittenWhenAskedFor) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"), 2);
  comm::run_thread_ranks(2, [&](comm::Communicator world) {
    Trainer trainer(config, tiny_dense(), tiny_loader(), world);
    bool asked = false;
    trainer.run([&](const StepMetrics& /*step*/) {
      if (world.rank() != 1 || asked) return;
      asked = true;
      Trainer::request_report();
      const auto until = std::chrono::steady_clock::now() + kAnswer;
      while (std::chrono::steady_clock::now() < until &&
             (flight(folder, 0).empty() || flight(folder, 1).empty())) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
    });
  });
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_NE(flight(folder, rank).find("Z: asked for\nrank " + std::to_string(rank) + "/2"),
              std::string::npos)
        << flight(folder, rank);
  }
}

}  // namespace
}  // namespace meshloom::train::run_watch
