// Tensors of a device over backends that move host memory: the same numbers as with host tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <vector>

#include "conformance/second_device.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::conformance {
namespace {

// Only a hang reaches it.
constexpr std::chrono::seconds kTimeout{60};

at::Tensor numbers(int rank, std::int64_t rows) {
  return at::arange(rows * 3, at::kDouble).add(100 * rank).view({rows, 3});
}

at::Tensor on_device(const at::Tensor& tensor) { return tensor.to(second_device()); }

/// The device tensor has these numbers, and is still one.
void expect_same(const at::Tensor& device, const at::Tensor& host) {
  ASSERT_EQ(device.device(), second_device());
  ASSERT_EQ(device.sizes(), host.sizes());
  EXPECT_TRUE(device.to(at::kCPU).eq(host).all().item<bool>());
}

class Staging : public ::testing::TestWithParam<int> {
 protected:
  void on_ranks(const std::function<void(Communicator)>& body) {
    run_thread_ranks(GetParam(), body, {.timeout = kTimeout});
  }
};

TEST_P(Staging, CollectivesGiveWhatHostTensorsGive) {
  on_ranks([](Communicator comm) {
    std::vector<std::int64_t> rows;
    std::int64_t total = 0;
    for (int r = 0; r < comm.size(); ++r) {
      rows.push_back((r + 1) % 3);
      total += rows.back();
    }
    const at::Tensor own = numbers(comm.rank(), rows[std::size_t(comm.rank())]);
    expect_same(comm.all_gather(on_device(own), rows).result(),
                comm.all_gather(own, rows).result());
    const at::Tensor all = numbers(comm.rank(), total);
    expect_same(comm.reduce_scatter(on_device(all), rows).result(),
                comm.reduce_scatter(all, rows).result());
    const std::vector<std::int64_t> even(std::size_t(comm.size()), 2);
    const at::Tensor letters = numbers(comm.rank(), 2 * comm.size());
    expect_same(comm.all_to_all(on_device(letters), even, even).result(),
                comm.all_to_all(letters, even, even).result());

    at::Tensor host = numbers(comm.rank(), 4);
    at::Tensor device = on_device(host);
    comm.all_reduce_(host, ReduceOp::kMax).wait();
    comm.all_reduce_(device, ReduceOp::kMax).wait();
    expect_same(device, host);
    host = numbers(comm.rank(), 5);
    device = on_device(host);
    const int root = comm.size() - 1;
    comm.broadcast_(host, root).wait();
    comm.broadcast_(device, root).wait();
    expect_same(device, host);
  });
}

TEST_P(Staging, MessagesArriveOnEitherSide) {
  on_ranks([](Communicator comm) {
    // One tensor to all others, device and host tensors in one call.
    const at::Tensor own = on_device(numbers(comm.rank(), 2));
    std::vector<at::Tensor> received;
    std::vector<Transfer> sends;
    std::vector<Transfer> receives;
    received.reserve(std::size_t(comm.size()));
    for (int r = 0; r < comm.size(); ++r) {
      received.push_back(r % 2 == 0 ? on_device(at::zeros({2, 3}, at::kDouble))
                                    : at::zeros({2, 3}, at::kDouble));
      sends.push_back({.peer = r, .tensor = &own});
      receives.push_back({.peer = r, .tensor = &received.back()});
    }
    auto work = comm.send_receive(sends, receives);
    work.wait();
    work.wait();  // what was delivered stays
    for (int r = 0; r < comm.size(); ++r) {
      const at::Tensor& one = received[std::size_t(r)];
      EXPECT_EQ(one.is_cpu(), r % 2 != 0);
      EXPECT_TRUE(one.to(at::kCPU).eq(numbers(r, 2)).all().item<bool>()) << "from rank " << r;
    }
    expect_same(own, numbers(comm.rank(), 2));
  });
}

TEST_P(Staging, AccountsAreThoseOfHostTensors) {
  on_ranks([](Communicator comm) {
    at::Tensor device = on_device(numbers(comm.rank(), 4));
    at::Tensor host = numbers(comm.rank(), 4);
    comm.all_reduce_(device, ReduceOp::kSum, {.timeout = std::nullopt, .purpose = "device"}).wait();
    comm.all_reduce_(host, ReduceOp::kSum, {.timeout = std::nullopt, .purpose = "host"}).wait();
    Traffic traffic = comm.traffic();
    EXPECT_EQ(traffic["device"].sent_bytes, traffic["host"].sent_bytes);
  });
}

INSTANTIATE_TEST_SUITE_P(ThreadWorlds, Staging, ::testing::Values(1, 2, 3, 5));

TEST(StagingChecks, TensorsWithoutDataAreRefused) {
  run_thread_ranks(1,
                   [](Communicator comm) {
                     at::Tensor meta = at::empty({2}, at::TensorOptions().device(at::kMeta));
                     EXPECT_THROW(static_cast<void>(comm.all_reduce_(meta)), InvalidArgument);
                   },
                   {.timeout = kTimeout});
}

TEST(SecondDevice, HostMemoryIsNotItsMemory) {
  const at::Tensor host = numbers(0, 2);
  const at::Tensor device = on_device(host);
  EXPECT_NE(*static_cast<const double*>(device.const_data_ptr()), host[0][0].item<double>());
  expect_same(device, host);
}

}  // namespace
}  // namespace meshloom::comm::conformance
