#include "meshloom/parallel/tensor_parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <gtest/gtest.h>

#include <vector>

#include "exchange_sweep.h"
#include "meshloom/comm/backends.h"

namespace meshloom::parallel::tensor_parallel {
namespace {

constexpr std::int64_t kIn = 12;
constexpr std::int64_t kOut = 20;
constexpr std::int64_t kVocabulary = 32;

using exchange_sweep::random_tensor;

void expect_near(const at::Tensor& given, const at::Tensor& expected) {
  ASSERT_EQ(given.sizes(), expected.sizes());
  if (given.numel() == 0) return;
  EXPECT_LE(given.sub(expected).abs().max().item<double>(),
            1e-12 * expected.abs().max().item<double>());
}

/// Tokens fewer than ranks, in one piece, and in two of unequal size.
TEST(TensorParallel, ProductsAreThoseOfOneRank) {
  for (const int ranks : {1, 2, 4}) {
    for (const std::int64_t tokens : {0, 1, 3, 50, 1031}) {
      const at::Tensor x = random_tensor({tokens, kIn}, 1);
      const at::Tensor weight =
          random_tensor({kOut, kIn}, 2);  // split by output, then by input features
      const at::Tensor bias = random_tensor({kOut}, 3);
      const at::Tensor back = random_tensor({kIn, kOut}, 4);
      const at::Tensor dy = random_tensor({tokens, kOut}, 5);
      comm::run_thread_ranks(ranks, [&](comm::Communicator group) {
        SCOPED_TRACE(std::to_string(ranks) + " ranks, " + std::to_string(tokens) + " tokens");
        TensorParallel parallel(group, tokens, kVocabulary);
        const plan::TokenRange own = parallel.own_rows(tokens);
        const auto rows = [&](const at::Tensor& all) {
          return all.narrow(0, own.begin, own.size()).contiguous();
        };
        const std::int64_t width = kOut / ranks;
        const auto features = [&](const at::Tensor& all, std::int64_t dim) {
          return all.narrow(dim, group.rank() * width, width).contiguous();
        };
        const at::Tensor own_weight = features(weight, 0);
        expect_near(parallel.column(rows(x), own_weight, features(bias, 0)),
                    features(x.mm(weight.t()) + bias, 1));
        at::Tensor gathered;
        const at::Tensor own_dy = features(dy, 1);
        expect_near(
            parallel.column_backward(own_dy, own_weight, rows(x),
                                     [&](const at::Tensor& all) { gathered = all.clone(); }),
            rows(dy.mm(weight)));
        expect_near(gathered, x);
        const at::Tensor own_back = features(back, 1);
        expect_near(parallel.row(own_dy, own_back, {}), rows(dy.mm(back.t())));
        const auto through = parallel.row_backward(rows(x), own_back);
        expect_near(through.dx, features(x.mm(back), 1));
        expect_near(through.dy, x);
        expect_near(parallel.all_rows(rows(x)), x);
        expect_near(parallel.all_rows_backward(x), rows(x * ranks));
      });
    }
  }
}

}  // namespace
}  // namespace meshloom::parallel::tensor_parallel
