// The sweep of exchange_test.cc with processes as ranks, under mpirun.
#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>

#include "exchange_sweep.h"
#include "mpi_main.h"

namespace meshloom::parallel::exchange_sweep {
namespace {

// fp64 sums over at most some hundred keys, merged in another order.
constexpr double kFp64Tolerance = 1e-12;

std::optional<comm::Communicator> mpi_world;  // tests take no arguments

TEST(ExchangesMpi, EqualOneProcessAndSendTheClosedForm) {
  constexpr double kShortRun = 0.3;
  int cases = 0;
  for_cases_of_run(mpi_world->size(), kShortRun, [&](const Case& c) {
    SCOPED_TRACE(c.text());
    const Whole whole(c);
    const Found found = run(*mpi_world, c, whole);
    EXPECT_LE(found.error, kFp64Tolerance);
    at::Tensor sent = at::tensor({found.sent.forward, found.sent.backward}, at::kLong);
    mpi_world->all_reduce_(sent, comm::ReduceOp::kSum, {.timeout = std::nullopt, .purpose = "test"})
        .wait();
    const auto expected = plan::exchange_bytes(c.lengths, static_cast<int>(c.ranks.size()),
                                               c.exchange, c.group, c.shape());
    EXPECT_EQ(sent[0].item<std::int64_t>(), expected.forward);
    EXPECT_EQ(sent[1].item<std::int64_t>(), expected.backward);
    ++cases;
  });
  EXPECT_GT(cases, 5);
}

}  // namespace
}  // namespace meshloom::parallel::exchange_sweep

int main(int argc, char** argv) {
  return meshloom::parallel::run_mpi_tests(argc, argv,
                                           meshloom::parallel::exchange_sweep::mpi_world);
}
