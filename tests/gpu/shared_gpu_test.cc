// Several processes on one device over MPI, which moves their tensors through host memory: the
// communicator's data contract and a distributed step, with real CUDA kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/train/trainer.h"
#include "unit/temporary_folder.h"
#include "unit/train/tiny_run.h"

namespace meshloom {
namespace {

// Only a hang reaches it.
constexpr std::chrono::seconds kTimeout{120};
// fp64 in another order, on another device.
constexpr double kParity = 1e-10;

const at::TensorOptions kOnDevice = at::TensorOptions().device(at::Device(at::kCUDA, 0));

comm::Communicator* world_of_all = nullptr;

TEST(SharedGpu, CollectivesAndMessagesMoveDeviceTensors) {
  comm::Communicator& world = *world_of_all;
  const int n = world.size();
  const int rank = world.rank();
  at::Tensor sum = at::full({1000}, rank + 1, kOnDevice.dtype(at::kDouble));
  world.all_reduce_(sum).wait();
  EXPECT_TRUE(sum.is_cuda());
  EXPECT_EQ(sum.min().item<double>(), n * (n + 1) / 2.0);
  EXPECT_EQ(sum.max().item<double>(), n * (n + 1) / 2.0);
  std::vector<std::int64_t> rows;
  for (int r = 0; r < n; ++r) rows.push_back(r + 1);
  const at::Tensor own = at::full({rank + 1, 5}, rank, kOnDevice);
  const at::Tensor all = world.all_gather(own, rows).result();
  EXPECT_TRUE(all.is_cuda());
  EXPECT_EQ(all.sum().item<float>(), static_cast<float>(5 * (n - 1) * n * (n + 1) / 3));
  const at::Tensor mine = world.reduce_scatter(all, rows).result();
  EXPECT_EQ(mine.size(0), rank + 1);
  EXPECT_EQ(mine.max().item<float>(), static_cast<float>(rank * n));
  // Written by kernels that may not have run when the message is handed over.
  at::Tensor out = at::zeros({1 << 20}, kOnDevice);
  for (int i = 0; i <= rank; ++i) out.add_(1);
  at::Tensor in = at::empty_like(out);
  const comm::Transfer send{(rank + 1) % n, &out};
  const comm::Transfer receive{(rank + n - 1) % n, &in};
  world.send_receive({&send, 1}, {&receive, 1}).wait();
  const auto expected = static_cast<float>((rank + n - 1) % n + 1);
  EXPECT_EQ(in.min().item<float>(), expected);
  EXPECT_EQ(in.max().item<float>(), expected);
}

TEST(SharedGpu, TrainingOnOneDeviceIsTrainingOnOneCpu) {
  comm::Communicator& world = *world_of_all;
  const TemporaryFolder folder;
  for (const bool moe : {false, true}) {
    train::TrainConfig config = train::tiny_config(folder.file("run"), 4);
    config.dtype = "float64";
    config.deterministic = false;
    config.cost = CostModel{.quadratic = 1e-6, .linear = 1e-4, .fixed = 1e-3, .exchange = 0.0};
    const model::ModelConfig model = moe ? train::tiny_moe() : train::tiny_dense();
    std::vector<double> expected;
    {
      train::TrainConfig alone = config;
      train::Trainer trainer(alone, model, train::tiny_loader(), comm::make_thread_world(1)[0]);
      while (!trainer.finished()) expected.push_back(trainer.step().loss);
    }
    config.device = "cuda:0";
    if (moe) config.layout = Layout{.hdp = world.size(), .ep = 2};
    train::Trainer trainer(config, model, train::tiny_loader(), world);
    for (const double loss : expected) {
      EXPECT_NEAR(trainer.step().loss, loss, kParity * std::max(1.0, loss))
          << (moe ? "moe" : "dense");
    }
  }
}

}  // namespace
}  // namespace meshloom

// Every rank runs every test in the same order; one failed rank fails the program on all.
int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  auto world = meshloom::comm::make_mpi_world({.timeout = meshloom::kTimeout});
  meshloom::world_of_all = &world;
  if (world.rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
  }
  auto result = at::full({1}, RUN_ALL_TESTS() == 0 ? 0 : 1, at::kInt);
  world.all_reduce_(result, meshloom::comm::ReduceOp::kMax).wait();
  return result[0].item<int>();
}
