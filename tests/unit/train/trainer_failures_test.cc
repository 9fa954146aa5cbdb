// What ends all ranks alike, with one error that names the rank to blame.

#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/train/trainer.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train::trainer_failures {
namespace {

void construct(int ranks, const TrainConfig& config) {
  comm::run_thread_ranks(ranks, [&](comm::Communicator world) {
    const Trainer trainer(config, tiny_dense(), tiny_loader(), world);
  });
}

TEST(Trainer, StrategyThatBreaksAContractEndsAllRanksAlike) {
  const TemporaryFolder folder;
  const auto drops = plan::make_strategy([](const plan::PlanProblem& problem) {
    return std::vector<plan::Slot>{
        {{plan::Unit{.ranks = {0}, .samples = {problem.samples[0].id}}}}};
  });
  std::mutex mutex;
  std::vector<std::string> messages;
  comm::run_thread_ranks(3, [&](comm::Communicator world) {
    Trainer trainer(tiny_config(folder.file("run")), tiny_dense(), tiny_loader(), world, drops);
    const std::string message = message_of<PlanError>([&] { static_cast<void>(trainer.step()); });
    const std::lock_guard lock(mutex);
    messages.push_back(message);
  });
  EXPECT_NE(messages[0].find("rank 0/3"), std::string::npos) << messages[0];
  EXPECT_EQ(messages[0], messages[1]);
  EXPECT_EQ(messages[0], messages[2]);
}

TEST(Trainer, RankThatCannotLoadEndsAllRanksAndIsNamed) {
  const TemporaryFolder folder;
  const std::vector<data::Document> documents = tiny_documents();
  std::mutex mutex;
  std::vector<std::string> messages;
  comm::run_thread_ranks(3, [&](comm::Communicator world) {
    const int rank = world.rank();
    data::LoaderOptions options;
    options.global_batch_tokens = 256;
    options.max_document_tokens = 128;
    auto source = data::callback_source("files", static_cast<std::int64_t>(documents.size()),
                                        [&documents, rank](std::int64_t index) {
                                          if (rank == 2) throw IoError("test", "disk gone");
                                          return documents[static_cast<std::size_t>(index)];
                                        });
    auto loader = std::make_shared<data::Loader>(
        std::vector<data::WeightedSource>{{std::move(source), 1.0}}, options);
    Trainer trainer(tiny_config(folder.file("run")), tiny_dense(), loader, world);
    const std::string message = message_of<Error>([&] {
      while (!trainer.finished()) static_cast<void>(trainer.step());
    });
    const std::lock_guard lock(mutex);
    messages.push_back(message);
  });
  ASSERT_EQ(messages.size(), 3U);
  for (const std::string& message : messages) {
    EXPECT_NE(message.find("rank 2/3"), std::string::npos) << message;
    EXPECT_NE(message.find("disk gone"), std::string::npos) << message;
  }
}

TEST(Trainer, RanksWithOtherDocumentsAreRefused) {
  const TemporaryFolder folder;
  EXPECT_NE(message_of<DataError>([&] {
              comm::run_thread_ranks(2, [&](comm::Communicator world) {
                const Trainer trainer(tiny_config(folder.file("run")), tiny_dense(),
                                      tiny_loader(tiny_documents(60 + world.rank())), world);
              });
            }).find("rank 1/2: its documents differ"),
            std::string::npos);
}

TEST(Trainer, ConstructionFailsAlikeOnAllRanks) {
  const TemporaryFolder folder;
  TrainConfig config = tiny_config(folder.file("run"));
  config.layout.hdp = 3;
  EXPECT_NE(message_of<InvalidArgument>([&] {
              construct(2, config);
            }).find("needs 3 ranks, the world has 2; nearest that fit: "),
            std::string::npos);
  config = tiny_config(folder.file("run"));
  config.strategy = "balancd";
  EXPECT_NE(message_of<InvalidArgument>([&] { construct(2, config); }).find("balanced"),
            std::string::npos);
}

}  // namespace
}  // namespace meshloom::train::trainer_failures
