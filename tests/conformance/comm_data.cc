#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <thread>

#include "conformance/comm_bodies.h"
#include "meshloom/core/random.h"

namespace meshloom::comm::conformance {
namespace {

constexpr std::array kDtypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf,
                                at::kLong,   at::kInt,   at::kByte};

// Small integers, exact in every dtype; differs by rank and place.
at::Tensor pattern(int rank, std::int64_t rows, std::int64_t columns, at::ScalarType dtype) {
  auto values = at::arange(rows * columns, at::kLong).add(3 * rank).remainder(7);
  return values.view({rows, columns}).to(dtype);
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.eq(b).all().item<bool>();
}

at::Tensor reduced(int size, std::int64_t rows, std::int64_t columns, at::ScalarType dtype,
                   ReduceOp op) {
  auto result = pattern(0, rows, columns, at::kLong);
  for (int r = 1; r < size; ++r) {
    const auto next = pattern(r, rows, columns, at::kLong);
    if (op == ReduceOp::kSum) result = result.add(next);
    if (op == ReduceOp::kMax) result = result.maximum(next);
    if (op == ReduceOp::kMin) result = result.minimum(next);
  }
  return result.to(dtype);
}

void all_reduce_sweeps_dtypes_operations_and_sizes(Communicator& comm) {
  for (const auto dtype : kDtypes) {
    for (const auto op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      for (const std::int64_t elements : {1, 7, 5'000, 40'001}) {
        auto tensor = pattern(comm.rank(), elements, 1, dtype);
        comm.all_reduce_(tensor, op).wait();
        EXPECT_TRUE(same(tensor, reduced(comm.size(), elements, 1, dtype, op)))
            << c10::toString(dtype) << " " << elements;
      }
    }
  }
}

// Beyond every threshold: cut into pieces, shared by threads, sent by rendezvous.
void large_tensors_arrive_whole(Communicator& comm) {
  constexpr std::int64_t kElements = 1'500'007;
  auto tensor = pattern(comm.rank(), kElements, 1, at::kFloat);
  comm.all_reduce_(tensor).wait();
  EXPECT_TRUE(same(tensor, reduced(comm.size(), kElements, 1, at::kFloat, ReduceOp::kSum)));
  auto cast = pattern(comm.rank(), kElements, 1, at::kInt);
  comm.broadcast_(cast, comm.size() - 1).wait();
  EXPECT_TRUE(same(cast, pattern(comm.size() - 1, kElements, 1, at::kInt)));
  std::vector<std::int64_t> rows(comm.size(), 0);
  rows[0] = 200'003;
  rows.back() += 10;
  std::int64_t total = 0;
  for (const auto count : rows) total += count;
  const auto input = pattern(comm.rank(), total, 3, at::kFloat);
  const auto part = comm.reduce_scatter(input, rows).result();
  std::int64_t begin = 0;
  for (int r = 0; r < comm.rank(); ++r) begin += rows[r];
  const auto expected = reduced(comm.size(), total, 3, at::kFloat, ReduceOp::kSum);
  EXPECT_TRUE(same(part, expected.narrow(0, begin, rows[comm.rank()])));
}

void all_gather_and_reduce_scatter_are_uneven(Communicator& comm) {
  for (const auto dtype : kDtypes) {
    for (const int step : {0, 1, 2}) {
      std::vector<std::int64_t> rows;
      std::vector<at::Tensor> parts;
      std::int64_t total = 0;
      std::int64_t begin = 0;
      for (int r = 0; r < comm.size(); ++r) {
        rows.push_back((r * 5 + step) % 4);
        if (r < comm.rank()) begin += rows.back();
        total += rows.back();
        parts.push_back(pattern(r, rows.back(), 3, dtype));
      }
      const auto own = rows[comm.rank()];
      const auto gathered = comm.all_gather(parts[comm.rank()], rows).result();
      EXPECT_TRUE(same(gathered, at::cat(parts)));
      const auto input = pattern(comm.rank(), total, 3, dtype);
      const auto scattered = comm.reduce_scatter(input, rows).result();
      const auto expected = reduced(comm.size(), total, 3, dtype, ReduceOp::kSum);
      EXPECT_TRUE(same(scattered, expected.narrow(0, begin, own)));
      EXPECT_TRUE(same(input, pattern(comm.rank(), total, 3, dtype))) << "input was modified";
    }
  }
}

at::Tensor letter(int source, int target, std::int64_t rows, at::ScalarType dtype) {
  return at::full({rows, 2}, 10 * source + target, dtype);
}

void all_to_all_is_uneven(Communicator& comm) {
  const auto count = [](int source, int target) { return (source + 2 * target) % 3; };
  for (const auto dtype : kDtypes) {
    std::vector<std::int64_t> to;
    std::vector<std::int64_t> from;
    std::vector<at::Tensor> out;
    std::vector<at::Tensor> in;
    for (int r = 0; r < comm.size(); ++r) {
      to.push_back(count(comm.rank(), r));
      from.push_back(count(r, comm.rank()));
      out.push_back(letter(comm.rank(), r, to.back(), dtype));
      in.push_back(letter(r, comm.rank(), from.back(), dtype));
    }
    const auto result = comm.all_to_all(at::cat(out), to, from).result();
    EXPECT_TRUE(same(result, at::cat(in)));
  }
}

void broadcast_comes_from_every_root(Communicator& comm) {
  for (int root = 0; root < comm.size(); ++root) {
    for (const std::int64_t elements : {1, 13, 30'000}) {
      auto tensor = pattern(comm.rank(), elements, 1, at::kDouble);
      comm.broadcast_(tensor, root).wait();
      EXPECT_TRUE(same(tensor, pattern(root, elements, 1, at::kDouble)));
    }
  }
}

void barrier_waits_for_the_last_rank(Communicator& comm) {
  constexpr std::chrono::milliseconds kLate{60};
  constexpr std::chrono::milliseconds kAlmost{40};  // clocks of the ranks start apart
  comm.barrier().wait();
  const auto start = std::chrono::steady_clock::now();
  if (comm.rank() == comm.size() - 1) std::this_thread::sleep_for(kLate);
  comm.barrier().wait();
  EXPECT_GE(std::chrono::steady_clock::now() - start, kAlmost);
}

void messages_of_a_pair_arrive_in_order(Communicator& comm) {
  const int n = comm.size();
  const int next = (comm.rank() + 1) % n;
  const int previous = (comm.rank() + n - 1) % n;
  constexpr int kMessages = 5;
  std::vector<at::Tensor> out;
  std::vector<at::Tensor> in;
  for (int m = 0; m < kMessages; ++m) {
    const std::int64_t rows = m == 2 ? 0 : 1 + 3'000 * m;  // an empty one among them
    out.push_back(at::full({rows, 2}, 100 * comm.rank() + m, at::kInt));
    in.push_back(at::zeros({rows, 2}, at::kInt));
  }
  std::vector<Transfer> sends;
  std::vector<Transfer> receives;
  for (int m = 0; m < kMessages; ++m) {
    sends.push_back({next, &out[m]});
    receives.push_back({previous, &in[m]});
  }
  // Grouped differently on the two sides, but with NCCL, where the calls of two ranks must match.
  const std::size_t early = comm.backend() == "nccl" ? 2 : 4;
  auto first = comm.send_receive(std::span(sends).first(2), std::span(receives).first(early));
  auto second = comm.send_receive(std::span(sends).subspan(2), std::span(receives).subspan(early));
  second.wait();
  first.wait();
  for (int m = 0; m < kMessages; ++m) {
    EXPECT_TRUE(same(in[m], at::full_like(out[m], 100 * previous + m))) << m;
  }
}

void a_rank_sends_to_itself_and_to_all(Communicator& comm) {
  std::vector<at::Tensor> out;
  std::vector<at::Tensor> in;
  std::vector<Transfer> sends;
  std::vector<Transfer> receives;
  for (int r = 0; r < comm.size(); ++r) {
    out.push_back(letter(comm.rank(), r, 4, at::kHalf));
    in.push_back(at::zeros({4, 2}, at::kHalf));
  }
  for (int r = 0; r < comm.size(); ++r) {
    sends.push_back({r, &out[r]});
    receives.push_back({r, &in[r]});
  }
  comm.send_receive(sends, receives).wait();
  for (int r = 0; r < comm.size(); ++r) {
    EXPECT_TRUE(same(in[r], letter(r, comm.rank(), 4, at::kHalf)));
  }
}

// A message between two ranks may wait across collectives of all.
void messages_and_collectives_do_not_order_each_other(Communicator& comm) {
  // NCCL wants a message to oneself and its receive in one call.
  if (comm.backend() == "nccl" && comm.size() == 1) return;
  const int last = comm.size() - 1;
  auto note = at::full({3}, 5.0);
  auto read = at::zeros({3});
  Work receive;
  const std::vector<Transfer> from{{last, &read}};
  const std::vector<Transfer> to{{0, &note}};
  if (comm.rank() == 0) receive = comm.send_receive({}, from);
  auto large = at::full({50'000}, 1.0, at::kFloat);
  comm.all_reduce_(large).wait();
  comm.barrier().wait();
  if (comm.rank() == last) comm.send_receive(to, {}).wait();
  receive.wait();
  if (comm.rank() == 0) {
    EXPECT_TRUE(same(read, note));
  }
  EXPECT_EQ(large[7].item<float>(), static_cast<float>(comm.size()));
}

void many_calls_are_outstanding_at_once(Communicator& comm) {
  constexpr int kCalls = 40;
  const std::vector<std::int64_t> rows(comm.size(), 2);
  std::vector<at::Tensor> tensors;
  std::vector<Work> reductions;
  std::vector<Work> gathers;
  for (int i = 0; i < kCalls; ++i) {
    tensors.push_back(at::full({i * 300 + 1}, comm.rank() + i, at::kLong));
  }
  for (int i = 0; i < kCalls; ++i) {
    reductions.push_back(comm.all_reduce_(tensors[i]));
    gathers.push_back(comm.all_gather(at::full({2, 1}, comm.rank() * i, at::kInt), rows));
  }
  const int n = comm.size();
  for (int i = kCalls - 1; i >= 0; --i) {
    const auto gathered = gathers[i].result();
    EXPECT_EQ(gathered[2 * n - 1][0].item<int>(), (n - 1) * i);
    reductions[i].wait();
    EXPECT_TRUE(tensors[i].eq(n * (n - 1) / 2 + n * i).all().item<bool>());
  }
}

// Values whose sum depends on the order: every rank must have the bits of rank order.
void reductions_run_in_rank_order(Communicator& comm) {
  if (!comm.deterministic()) return;
  constexpr std::int64_t kElements = 9'001;
  const auto values = [](int rank) {
    auto result = at::zeros({kElements}, at::kFloat);
    auto* data = result.mutable_data_ptr<float>();
    for (std::int64_t i = 0; i < kElements; ++i) {
      data[i] = static_cast<float>(random_normal(static_cast<std::uint64_t>(rank), i));
    }
    return result;
  };
  auto expected = values(0);
  for (int r = 1; r < comm.size(); ++r) expected = expected.add(values(r));
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    auto tensor = values(comm.rank()).to(dtype);
    if (dtype == at::kBFloat16) {  // one rounding at the end
      expected = values(0).to(dtype).to(at::kFloat);
      for (int r = 1; r < comm.size(); ++r) expected = expected.add(values(r).to(dtype));
    }
    comm.all_reduce_(tensor).wait();
    EXPECT_TRUE(same(tensor, expected.to(dtype))) << c10::toString(dtype);
  }
}

void groups_split_from_groups_are_independent(Communicator& comm) {
  const int rank = comm.rank();
  auto half = comm.split(rank % 2, -rank, "half");
  ASSERT_TRUE(half.has_value());
  auto all = at::full({4}, 1, at::kInt);
  auto part = at::full({4}, 1, at::kInt);
  auto in_all = comm.all_reduce_(all);
  auto in_half = half->all_reduce_(part);
  in_half.wait();
  in_all.wait();
  EXPECT_EQ(all[0].item<int>(), comm.size());
  EXPECT_EQ(part[0].item<int>(), half->size());
  auto head = at::full({1}, rank, at::kInt);
  half->broadcast_(head, 0).wait();
  const int highest = comm.size() - 1 - (comm.size() - 1 - rank) % 2;
  EXPECT_EQ(head[0].item<int>(), highest);
  auto quarter = half->split(half->rank() / 2, half->rank(), "quarter");
  auto other = comm.split(rank < 2 ? 0 : -1, rank, "first two");
  auto count = at::full({1}, 1, at::kInt);
  quarter->all_reduce_(count).wait();
  EXPECT_EQ(count[0].item<int>(), quarter->size());
  EXPECT_EQ(other.has_value(), rank < 2);
  if (other) {
    auto pair = at::full({1}, rank + 1, at::kInt);
    other->all_reduce_(pair).wait();
    EXPECT_EQ(pair[0].item<int>(), comm.size() == 1 ? 1 : 3);
  }
}

}  // namespace

std::vector<Body> data_bodies() {
  return {
      {"AllReduceSweepsDtypesOperationsAndSizes", all_reduce_sweeps_dtypes_operations_and_sizes},
      {"LargeTensorsArriveWhole", large_tensors_arrive_whole},
      {"AllGatherAndReduceScatterAreUneven", all_gather_and_reduce_scatter_are_uneven},
      {"AllToAllIsUneven", all_to_all_is_uneven},
      {"BroadcastComesFromEveryRoot", broadcast_comes_from_every_root},
      {"BarrierWaitsForTheLastRank", barrier_waits_for_the_last_rank},
      {"MessagesOfAPairArriveInOrder", messages_of_a_pair_arrive_in_order},
      {"ARankSendsToItselfAndToAll", a_rank_sends_to_itself_and_to_all},
      {"MessagesAndCollectivesDoNotOrderEachOther",
       messages_and_collectives_do_not_order_each_other},
      {"ManyCallsAreOutstandingAtOnce", many_calls_are_outstanding_at_once},
      {"ReductionsRunInRankOrder", reductions_run_in_rank_order},
      {"GroupsSplitFromGroupsAreIndependent", groups_split_from_groups_are_independent},
  };
}

}  // namespace meshloom::comm::conformance
