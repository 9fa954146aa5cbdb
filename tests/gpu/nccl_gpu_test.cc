// NCCL itself on one device: a world of one rank, whose collectives and messages to itself go
// through real communicators, streams and events.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"

namespace meshloom::comm {
namespace {

// Only a hang reaches it.
constexpr std::chrono::seconds kTimeout{60};
constexpr std::int64_t kElements = 1 << 20;

const at::Device kDevice(at::kCUDA, 0);

Communicator nccl_world(const NcclOptions& limits = {}) {
  return make_nccl_world(make_thread_world(1)[0], 0, {.timeout = kTimeout}, limits);
}

at::Tensor numbers(at::ScalarType type = at::kFloat) {
  return at::arange(kElements, at::TensorOptions().dtype(at::kDouble).device(kDevice))
      .remainder(251)
      .to(type);
}

bool same(const at::Tensor& a, const at::Tensor& b) { return a.cpu().equal(b.cpu()); }

TEST(NcclOnGpu, CollectivesOfOneRankGiveBackTheInput) {
  auto world = nccl_world();
  EXPECT_EQ(world.backend(), "nccl");
  const std::vector<std::int64_t> rows{kElements};
  for (const auto type :
       {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kLong, at::kInt, at::kByte}) {
    const at::Tensor input = numbers(type);
    at::Tensor tensor = input.clone();
    for (const auto op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      world.all_reduce_(tensor, op).wait();
    }
    EXPECT_TRUE(same(tensor, input)) << c10::toString(type);
    world.broadcast_(tensor, 0).wait();
    EXPECT_TRUE(same(tensor, input)) << c10::toString(type);
    EXPECT_TRUE(same(world.all_gather(input, rows).result(), input)) << c10::toString(type);
    EXPECT_TRUE(same(world.reduce_scatter(input, rows).result(), input)) << c10::toString(type);
    EXPECT_TRUE(same(world.all_to_all(input, rows, rows).result(), input)) << c10::toString(type);
  }
  world.barrier().wait();
  for (const auto& [purpose, entry] : world.traffic()) {
    EXPECT_EQ(entry.sent_bytes, 0) << purpose << ": to itself is no traffic";
  }
}

TEST(NcclOnGpu, MessagesToItselfArriveInOrder) {
  auto world = nccl_world();
  const at::Tensor first = numbers();
  const at::Tensor second = numbers().neg();
  at::Tensor to_first = at::zeros_like(first);
  at::Tensor to_second = at::zeros_like(first);
  const std::vector<Transfer> sends{{0, &first}, {0, &second}};
  const std::vector<Transfer> receives{{0, &to_first}, {0, &to_second}};
  world.send_receive(sends, receives).wait();
  EXPECT_TRUE(same(to_first, first));
  EXPECT_TRUE(same(to_second, second));
}

TEST(NcclOnGpu, EmptyTensorsAreLegal) {
  auto world = nccl_world();
  at::Tensor none = at::empty({0, 3}, at::TensorOptions().device(kDevice));
  const std::vector<std::int64_t> rows{0};
  world.all_reduce_(none).wait();
  EXPECT_EQ(world.all_gather(none, rows).result().size(0), 0);
  EXPECT_EQ(world.all_to_all(none, rows, rows).result().size(0), 0);
  at::Tensor other = at::empty_like(none);
  const Transfer send{0, &none};
  const Transfer receive{0, &other};
  world.send_receive({&send, 1}, {&receive, 1}).wait();
}

TEST(NcclOnGpu, CallsFollowTheStreamAndMemoryIsKeptForThem) {
  auto world = nccl_world();
  for (int round = 0; round < 50; ++round) {
    // Written by kernels that may not have run when the call is made; dropped before it ends.
    at::Tensor tensor = at::full({kElements}, round, at::TensorOptions().device(kDevice));
    for (int i = 0; i < 20; ++i) tensor.add_(1);
    at::Tensor received = at::empty_like(tensor);
    const Transfer send{0, &tensor};
    const Transfer receive{0, &received};
    Work work = world.send_receive({&send, 1}, {&receive, 1});
    tensor = at::Tensor();
    const at::Tensor scribble = at::full({kElements}, -1, at::TensorOptions().device(kDevice));
    work.wait();
    EXPECT_EQ(received.min().item<float>(), static_cast<float>(round + 20));
    EXPECT_EQ(received.max().item<float>(), static_cast<float>(round + 20));
    EXPECT_EQ(scribble.max().item<float>(), -1.0F);
  }
}

TEST(NcclOnGpu, GroupsWorkAtTheSameTime) {
  NcclOptions limits;
  limits.ctas["pair"] = {1, 2};
  auto world = nccl_world(limits);
  auto pair = world.split(0, 0, "pair");
  auto other = world.split(0, 0, "other");
  ASSERT_TRUE(pair && other);
  EXPECT_FALSE(world.split(-1, 0, "nobody"));
  std::vector<Work> works;
  std::vector<at::Tensor> tensors;
  for (int i = 0; i < 30; ++i) {
    tensors.push_back(at::full({kElements}, i, at::TensorOptions().device(kDevice)));
    Communicator& group = i % 3 == 0 ? world : i % 3 == 1 ? *pair : *other;
    works.push_back(group.all_reduce_(tensors.back()));
  }
  for (Work& work : works) work.wait();
  for (int i = 0; i < 30; ++i) {
    EXPECT_EQ(tensors[static_cast<std::size_t>(i)][7].item<float>(), static_cast<float>(i));
  }
}

TEST(NcclOnGpu, AnAbortEndsTheGroupAndItsChildren) {
  auto world = nccl_world();
  auto child = world.split(0, 0, "child");
  world.abort("planted");
  at::Tensor tensor = numbers();
  EXPECT_THROW(world.all_reduce_(tensor).wait(), CommError);
  EXPECT_THROW(child->all_reduce_(tensor).wait(), CommError);
  EXPECT_NE(world.aborted().find("planted"), std::string::npos);
  // The next world is not touched by it.
  auto next = nccl_world();
  next.all_reduce_(tensor).wait();
}

TEST(NcclOnGpu, WrongDevicesAndHostTensorsAreRefused) {
  EXPECT_THROW((void)make_nccl_world(make_thread_world(1)[0], 99, {.timeout = kTimeout}),
               InvalidArgument);
  auto world = nccl_world();
  at::Tensor host = at::zeros({4});
  EXPECT_THROW((void)world.all_reduce_(host), InvalidArgument);
}

}  // namespace
}  // namespace meshloom::comm
