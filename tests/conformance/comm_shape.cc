#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "conformance/comm_bodies.h"
#include "meshloom/core/error.h"

namespace meshloom::comm::conformance {
namespace {

CallOptions purpose(const char* name) {
  CallOptions options;
  options.purpose = name;
  return options;
}

std::vector<std::int64_t> rows_by_rank(int size) {
  std::vector<std::int64_t> rows;
  for (int r = 0; r < size; ++r) rows.push_back(r % 3 == 1 ? 0 : r + 2);
  return rows;
}

std::int64_t total(const std::vector<std::int64_t>& rows) {
  std::int64_t result = 0;
  for (const auto count : rows) result += count;
  return result;
}

void results_have_their_shapes(Communicator& comm) {
  const int n = comm.size();
  const auto rows = rows_by_rank(n);
  const auto own = rows[comm.rank()];
  auto gathered = comm.all_gather(at::zeros({own, 3, 2}, at::kInt), rows).result();
  EXPECT_EQ(gathered.sizes(), at::IntArrayRef({total(rows), 3, 2}));
  EXPECT_EQ(gathered.scalar_type(), at::kInt);
  auto scattered = comm.reduce_scatter(at::zeros({total(rows), 5}, at::kDouble), rows).result();
  EXPECT_EQ(scattered.sizes(), at::IntArrayRef({own, 5}));
  const std::vector<std::int64_t> to(n, 2);
  auto exchanged = comm.all_to_all(at::zeros({2 * n, 4}, at::kHalf), to, to).result();
  EXPECT_EQ(exchanged.sizes(), at::IntArrayRef({2 * n, 4}));
  EXPECT_EQ(exchanged.scalar_type(), at::kHalf);
}

void zero_sizes_are_allowed_everywhere(Communicator& comm) {
  const int n = comm.size();
  const std::vector<std::int64_t> none(n, 0);
  auto empty = at::empty({0});
  comm.all_reduce_(empty).wait();
  comm.broadcast_(empty, n - 1).wait();
  EXPECT_EQ(comm.all_gather(at::empty({0, 7}), none).result().sizes(), at::IntArrayRef({0, 7}));
  EXPECT_EQ(comm.reduce_scatter(at::empty({0, 7}), none).result().sizes(), at::IntArrayRef({0, 7}));
  EXPECT_EQ(comm.all_to_all(at::empty({0, 7}), none, none).result().sizes(),
            at::IntArrayRef({0, 7}));
  const std::vector<std::int64_t> some(n, 3);
  EXPECT_EQ(comm.all_gather(at::empty({3, 0}), some).result().sizes(), at::IntArrayRef({3 * n, 0}));
  comm.send_receive({}, {}).wait();
  const std::vector<Transfer> sends{{(comm.rank() + 1) % n, &empty}};
  const std::vector<Transfer> receives{{(comm.rank() + n - 1) % n, &empty}};
  comm.send_receive(sends, receives).wait();
}

void wrong_arguments_are_refused_and_harmless(Communicator& comm) {
  const int n = comm.size();
  const std::vector<std::int64_t> one(n, 1);
  const std::vector<std::int64_t> longer(n + 1, 1);
  std::vector<std::int64_t> negative(n, 1);
  negative[0] = -1;
  const auto row = at::zeros({1, 2});
  const auto all = at::zeros({n, 2});
  at::Tensor undefined;
  auto transposed = at::zeros({3, 4}).t();
  auto booleans = at::zeros({3}, at::kBool);
  auto fine = at::zeros({3});
  EXPECT_THROW((void)comm.all_reduce_(undefined), InvalidArgument);
  EXPECT_THROW((void)comm.all_reduce_(transposed), InvalidArgument);
  EXPECT_THROW((void)comm.all_reduce_(booleans), InvalidArgument);
  EXPECT_THROW((void)comm.broadcast_(fine, n), InvalidArgument);
  EXPECT_THROW((void)comm.broadcast_(fine, -1), InvalidArgument);
  EXPECT_THROW((void)comm.all_gather(row, longer), InvalidArgument);
  EXPECT_THROW((void)comm.all_gather(at::zeros({2, 2}), one), InvalidArgument);
  EXPECT_THROW((void)comm.reduce_scatter(all, negative), InvalidArgument);
  EXPECT_THROW((void)comm.reduce_scatter(at::zeros({n + 1, 2}), one), InvalidArgument);
  EXPECT_THROW((void)comm.all_to_all(at::zeros({n + 1}), one, one), InvalidArgument);
  EXPECT_THROW((void)comm.all_to_all(at::zeros({}), one, one), InvalidArgument);
  const std::vector<Transfer> stranger{{n, &fine}};
  const std::vector<Transfer> nothing{{0, nullptr}};
  EXPECT_THROW((void)comm.send_receive(stranger, {}), InvalidArgument);
  EXPECT_THROW((void)comm.send_receive({}, nothing), InvalidArgument);
  try {
    (void)comm.all_to_all(at::zeros({n + 1}), one, one);
  } catch (const InvalidArgument& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("[comm.all_to_all] rank "), std::string::npos) << text;
    EXPECT_NE(text.find("group \"" + comm.name() + "\""), std::string::npos) << text;
    EXPECT_NE(text.find("send_rows sums to " + std::to_string(n)), std::string::npos) << text;
    EXPECT_NE(text.find("input has " + std::to_string(n + 1) + " rows"), std::string::npos) << text;
  }
  comm.barrier().wait();
}

void work_without_output_says_so(Communicator& comm) {
  EXPECT_THROW((void)comm.barrier().result(), InvalidArgument);
  Work none;
  EXPECT_TRUE(none.done());
  none.wait();
  EXPECT_THROW((void)none.result(), InvalidArgument);
  auto work = comm.barrier();
  work.wait();
  EXPECT_TRUE(work.done());
  work.wait();
}

void bytes_are_accounted_by_purpose_and_peer(Communicator& comm) {
  const std::int64_t n = comm.size();
  const int rank = comm.rank();
  comm.reset_traffic();
  EXPECT_TRUE(comm.traffic().empty());

  auto tensor = at::zeros({6, 10}, at::kDouble);
  comm.all_reduce_(tensor, ReduceOp::kSum, purpose("reduce")).wait();
  const auto rows = rows_by_rank(comm.size());
  comm.all_gather(at::zeros({rows[rank], 2}, at::kInt), rows, purpose("gather")).wait();
  comm.reduce_scatter(at::zeros({total(rows), 2}, at::kInt), rows, purpose("scatter")).wait();
  comm.broadcast_(tensor, 0, purpose("broadcast")).wait();
  std::vector<std::int64_t> to(n);
  std::vector<std::int64_t> from(n);
  for (int r = 0; r < n; ++r) to[r] = (rank + 2 * r) % 3;
  for (int r = 0; r < n; ++r) from[r] = (r + 2 * rank) % 3;
  comm.all_to_all(at::zeros({total(to), 4}, at::kByte), to, from, purpose("experts")).wait();
  const int next = static_cast<int>((rank + 1) % n);
  const int previous = static_cast<int>((rank + n - 1) % n);
  auto block = at::zeros({5}, at::kFloat);
  auto received = at::zeros({5}, at::kFloat);
  auto own = at::zeros({9}, at::kFloat);
  auto own_received = at::zeros({9}, at::kFloat);
  const std::vector<Transfer> sends{{next, &block}, {rank, &own}};
  const std::vector<Transfer> receives{{previous, &received}, {rank, &own_received}};
  if (n > 1) comm.send_receive(sends, receives, purpose("exchange")).wait();
  if (n > 1) comm.send_receive(sends, receives, purpose("exchange")).wait();

  auto traffic = comm.traffic();
  EXPECT_EQ(traffic["reduce"].sent_bytes, 2 * 480 * (n - 1) / n);
  EXPECT_EQ(traffic["reduce"].received_bytes, 2 * 480 * (n - 1) / n);
  EXPECT_EQ(traffic["gather"].sent_bytes, rows[rank] * 8 * (n - 1));
  EXPECT_EQ(traffic["gather"].received_bytes, (total(rows) - rows[rank]) * 8);
  EXPECT_EQ(traffic["scatter"].sent_bytes, (total(rows) - rows[rank]) * 8);
  EXPECT_EQ(traffic["scatter"].received_bytes, rows[rank] * 8 * (n - 1));
  EXPECT_EQ(traffic["broadcast"].sent_bytes, rank == 0 ? 480 * (n - 1) : 0);
  EXPECT_EQ(traffic["broadcast"].received_bytes, rank == 0 ? 0 : 480);
  EXPECT_EQ(traffic["experts"].sent_bytes, (total(to) - to[rank]) * 4);
  EXPECT_EQ(traffic["experts"].received_bytes, (total(from) - from[rank]) * 4);
  for (int r = 0; r < n; ++r) {
    EXPECT_EQ(traffic["experts"].sent_to[r], r == rank ? 0 : to[r] * 4);
  }
  if (n > 1) {
    EXPECT_EQ(traffic["exchange"].calls, 2);
    EXPECT_EQ(traffic["exchange"].sent_bytes, 40);
    EXPECT_EQ(traffic["exchange"].received_bytes, 40);
    EXPECT_EQ(traffic["exchange"].sent_to[next], 40);
    EXPECT_EQ(traffic["exchange"].sent_to.count(rank), 0U);
  }
  comm.reset_traffic();
  EXPECT_TRUE(comm.traffic().empty());
}

void calls_are_recorded(Communicator& comm) {
  comm.recorder().set_context("step 7");
  auto tensor = at::zeros({6});
  comm.all_reduce_(tensor, ReduceOp::kSum, purpose("reduce")).wait();
  comm.recorder().set_context("");
  const auto records = comm.recorder().records();
  ASSERT_FALSE(records.empty());
  EXPECT_EQ(records.back().operation, "all_reduce");
  EXPECT_EQ(records.back().group, comm.name());
  EXPECT_EQ(records.back().rank, comm.rank());
  EXPECT_EQ(records.back().purpose, "reduce");
  EXPECT_EQ(records.back().context, "step 7");
  EXPECT_EQ(records.back().state, OperationState::kDone);
  EXPECT_EQ(comm.pending_report(), "");
}

void splits_have_sizes_ranks_and_names(Communicator& comm) {
  const int n = comm.size();
  const int rank = comm.rank();
  // The rule that a fake world is told: colour rank % 2, key -rank; "low" leaves the upper half
  // out.
  auto half = comm.split(rank % 2, -rank, "parity");
  ASSERT_TRUE(half.has_value());
  const int members = rank % 2 == 0 ? (n + 1) / 2 : n / 2;
  EXPECT_EQ(half->size(), members);
  EXPECT_EQ(half->rank(), members - 1 - rank / 2);
  EXPECT_EQ(half->name(), "parity");
  EXPECT_EQ(half->backend(), comm.backend());
  auto low = comm.split(rank < (n + 1) / 2 ? 0 : -1, rank, "low");
  EXPECT_EQ(low.has_value(), rank < (n + 1) / 2);
  if (low) {
    EXPECT_EQ(low->size(), (n + 1) / 2);
    low->barrier().wait();
  }
  half->barrier().wait();
}

}  // namespace

std::vector<Body> shape_bodies() {
  return {
      {"ResultsHaveTheirShapes", results_have_their_shapes},
      {"ZeroSizesAreAllowedEverywhere", zero_sizes_are_allowed_everywhere},
      {"WrongArgumentsAreRefusedAndHarmless", wrong_arguments_are_refused_and_harmless},
      {"WorkWithoutOutputSaysSo", work_without_output_says_so},
      {"BytesAreAccountedByPurposeAndPeer", bytes_are_accounted_by_purpose_and_peer},
      {"CallsAreRecorded", calls_are_recorded},
      {"SplitsHaveSizesRanksAndNames", splits_have_sizes_ranks_and_names},
  };
}

}  // namespace meshloom::comm::conformance
