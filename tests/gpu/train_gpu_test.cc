// Training on one device: the same losses as on the CPU, over NCCL and without it.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/train/trainer.h"
#include "unit/temporary_folder.h"
#include "unit/train/tiny_run.h"

namespace meshloom::train {
namespace {

// fp64 in another order, on another device.
constexpr double kParity64 = 1e-10;
// A few steps of bf16 products against fp32 ones; the loss falls by far more.
constexpr double kParity16 = 3e-2;

std::vector<double> losses(const TrainConfig& config, const model::ModelConfig& model,
                           comm::Communicator world) {
  std::vector<double> result;
  Trainer trainer(config, model, tiny_loader(), std::move(world));
  while (!trainer.finished()) result.push_back(trainer.step().loss);
  return result;
}

TrainConfig config_in(const TemporaryFolder& folder, const std::string& dtype,
                      const std::string& device) {
  TrainConfig config = tiny_config(folder.file("run"), 5);
  config.dtype = dtype;
  config.device = device;
  config.deterministic = false;
  return config;
}

TEST(TrainOnGpu, LossesAreThoseOfTheCpu) {
  const TemporaryFolder folder;
  for (const bool moe : {false, true}) {
    const model::ModelConfig model = moe ? tiny_moe() : tiny_dense();
    const std::vector<double> expected =
        losses(config_in(folder, "float64", "cpu"), model, comm::make_thread_world(1)[0]);
    const auto near = [&](const std::vector<double>& given, double limit, const char* what) {
      ASSERT_EQ(given.size(), expected.size());
      for (std::size_t i = 0; i < given.size(); ++i) {
        EXPECT_NEAR(given[i], expected[i], limit * std::max(1.0, expected[i]))
            << what << (moe ? ", moe" : ", dense") << ", step " << i;
      }
    };
    near(losses(config_in(folder, "float64", "cuda:0"), model, comm::make_thread_world(1)[0]),
         kParity64, "over host memory");
    near(losses(config_in(folder, "float64", "cuda:0"), model,
                comm::make_nccl_world(comm::make_thread_world(1)[0], 0)),
         kParity64, "over NCCL");
    near(losses(config_in(folder, "bfloat16", "cuda:0"), model, comm::make_thread_world(1)[0]),
         kParity16, "in bf16");
  }
}

}  // namespace
}  // namespace meshloom::train
