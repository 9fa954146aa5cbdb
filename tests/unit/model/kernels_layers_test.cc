#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "kernels_support.h"
#include "meshloom/core/error.h"
#include "meshloom/model/ops.h"

namespace meshloom::model {
namespace {

using testing::at_every_level;
using testing::close;
using testing::kernel_types;
using testing::leaf;
using testing::tolerance;

constexpr double kEps = 1e-6;

at::Tensor norm_reference(const at::Tensor& x, const at::Tensor& weight) {
  return weight * (x * at::rsqrt(x.square().mean({-1}, true) + kEps));
}

/// Hugging Face's rotate_half on [T, n, D] with tables [T, R / 2].
at::Tensor rotate_reference(const at::Tensor& x, const ops::RopeTables& tables) {
  const at::Tensor cos = at::cat({tables.cos, tables.cos}, 1).to(at::kDouble).unsqueeze(1);
  const at::Tensor sin = at::cat({tables.sin, tables.sin}, 1).to(at::kDouble).unsqueeze(1);
  const std::int64_t rotated = cos.size(2);
  const at::Tensor head = x.slice(2, 0, rotated);
  const at::Tensor half = at::cat({-head.slice(2, rotated / 2), head.slice(2, 0, rotated / 2)}, 2);
  return at::cat({head * cos + half * sin, x.slice(2, rotated)}, 2);
}

ops::RopeTables tables_for(std::int64_t tokens, std::int64_t rotated, at::ScalarType type) {
  const at::Tensor positions = at::randint(0, 500, {tokens}, at::kLong);
  const at::Tensor frequencies = at::rand({rotated / 2}, at::TensorOptions().dtype(type));
  return ops::rope_tables(positions, frequencies, 1.25);
}

}  // namespace

TEST(KernelNorm, ForwardAndBackwardMatchAutograd) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 7, 130}) {
        for (const std::int64_t hidden : {1, 5, 16, 257, 768}) {
          const auto options = at::TensorOptions().dtype(type);
          const at::Tensor x = at::randn({tokens, hidden}, options);
          const at::Tensor weight = at::randn({hidden}, options);
          const at::Tensor dy = at::randn({tokens, hidden}, options);
          const at::Tensor residual = at::randn({tokens, hidden}, options);
          const at::Tensor xr = leaf(x);
          const at::Tensor wr = leaf(weight);
          const at::Tensor yr = norm_reference(xr, wr);
          yr.backward(dy.to(at::kDouble));

          const ops::NormOutput out = ops::rms_norm(x, weight, kEps);
          EXPECT_TRUE(close(out.y, yr, tolerance(type)));
          at::Tensor dx = residual.clone();
          const at::Tensor dw = ops::rms_norm_backward_(dx, dy, x, weight, out.rstd);
          EXPECT_TRUE(close(dx, xr.grad() + residual, tolerance(type)));
          EXPECT_TRUE(close(dw, wr.grad(), tolerance(type)));

          at::Tensor sum = x.clone();
          const ops::NormOutput fused = ops::add_rms_norm_(sum, residual, weight, kEps);
          EXPECT_TRUE(close(sum, x + residual, tolerance(type)));
          EXPECT_TRUE(close(fused.y,
                            norm_reference((x + residual).to(at::kDouble), weight.to(at::kDouble)),
                            tolerance(type)));
        }
      }
    }
  });
}

TEST(KernelRope, RotationAndItsBackwardMatchAutograd) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 33}) {
        for (const std::int64_t head_dim : {2, 6, 32, 80, 128}) {
          const ops::QkvLayout layout{4, 2, head_dim};
          const std::int64_t rotated = head_dim == 80 ? 40 : head_dim;
          const ops::RopeTables tables = tables_for(tokens, rotated, type);
          const auto options = at::TensorOptions().dtype(type);
          const at::Tensor qkv = at::randn({tokens, layout.width()}, options);
          const at::Tensor dqkv = at::randn({tokens, 8, head_dim}, options);
          const at::Tensor x = leaf(qkv);
          const at::Tensor heads = x.view({tokens, 8, head_dim});
          const at::Tensor y =
              at::cat({rotate_reference(heads.slice(1, 0, 6), tables), heads.slice(1, 6)}, 1);
          y.backward(dqkv.to(at::kDouble));

          at::Tensor out = qkv.clone();
          ops::rope_(out, layout, tables);
          EXPECT_TRUE(close(out, y.flatten(1), tolerance(type)));
          const at::Tensor back = ops::rope_backward(dqkv.slice(1, 0, 4), dqkv.slice(1, 4, 6),
                                                     dqkv.slice(1, 6), tables, type);
          EXPECT_TRUE(close(back, x.grad(), tolerance(type)));
        }
      }
    }
  });
}

TEST(KernelRope, PartsOfHeadsRotateInPlaceThereAndBack) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 33}) {
        for (const std::int64_t rotated : {2, 6, 64}) {
          for (const bool interleaved : {false, true}) {
            const ops::RopeTables tables = tables_for(tokens, rotated, type);
            const auto options = at::TensorOptions().dtype(type);
            const at::Tensor heads = at::randn({tokens, 3, 7 + rotated}, options);
            const at::Tensor before = heads.clone();
            const at::Tensor x = leaf(heads.slice(2, 7));
            // Neighbours are halves in another order of the numbers.
            const auto halves = [&](const at::Tensor& t) {
              if (!interleaved) return t;
              return at::cat({t.slice(2, 0, rotated, 2), t.slice(2, 1, rotated, 2)}, 2);
            };
            const at::Tensor y = rotate_reference(halves(x), tables);
            const at::Tensor dy = at::randn({tokens, 3, rotated}, options);
            y.backward(halves(dy).to(at::kDouble));

            at::Tensor part = heads.slice(2, 7);
            ops::rotate_(part, tables, interleaved);
            EXPECT_TRUE(close(halves(part), y, tolerance(type)));
            EXPECT_TRUE(heads.slice(2, 0, 7).equal(before.slice(2, 0, 7)));
            at::Tensor back = dy.clone();
            ops::rotate_(back, tables, interleaved, true);
            EXPECT_TRUE(close(back, x.grad(), tolerance(type)));
          }
        }
      }
    }
  });
}

TEST(KernelRope, NormedHeadsMatchAutograd) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 150}) {
        for (const std::int64_t head_dim : {2, 10, 32, 128}) {
          const ops::QkvLayout layout{4, 2, head_dim};
          const ops::RopeTables tables = tables_for(tokens, head_dim, type);
          const auto options = at::TensorOptions().dtype(type);
          const at::Tensor qkv = at::randn({tokens, layout.width()}, options);
          const at::Tensor dqkv = at::randn({tokens, 8, head_dim}, options);
          const at::Tensor qw = at::randn({head_dim}, options);
          const at::Tensor kw = at::randn({head_dim}, options);
          const at::Tensor x = leaf(qkv);
          const at::Tensor qwr = leaf(qw);
          const at::Tensor kwr = leaf(kw);
          const at::Tensor heads = x.view({tokens, 8, head_dim});
          const at::Tensor q = rotate_reference(norm_reference(heads.slice(1, 0, 4), qwr), tables);
          const at::Tensor k = rotate_reference(norm_reference(heads.slice(1, 4, 6), kwr), tables);
          at::cat({q, k, heads.slice(1, 6)}, 1).backward(dqkv.to(at::kDouble));

          const ops::QkOutput out = ops::qk_norm_rope(qkv, layout, qw, kw, kEps, tables);
          EXPECT_TRUE(close(out.q, q, tolerance(type)));
          EXPECT_TRUE(close(out.k, k, tolerance(type)));
          const ops::QkNormGradients back =
              ops::qk_norm_rope_backward(dqkv.slice(1, 0, 4), dqkv.slice(1, 4, 6), dqkv.slice(1, 6),
                                         qkv, qw, kw, kEps, tables);
          EXPECT_TRUE(close(back.dqkv, x.grad(), tolerance(type)));
          EXPECT_TRUE(close(back.q_weight, qwr.grad(), tolerance(type)));
          EXPECT_TRUE(close(back.k_weight, kwr.grad(), tolerance(type)));
        }
      }
    }
  });
}

TEST(KernelSwiglu, ForwardAndBackwardMatchAutograd) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const std::int64_t tokens : {0, 1, 65}) {
        for (const std::int64_t inner : {1, 16, 37, 512}) {
          const auto options = at::TensorOptions().dtype(type);
          const at::Tensor gate_up = at::randn({tokens, 2 * inner}, options) * 6.0;
          const at::Tensor dy = at::randn({tokens, inner}, options);
          const at::Tensor x = leaf(gate_up);
          const at::Tensor gate = x.slice(1, 0, inner);
          const at::Tensor y = gate * at::sigmoid(gate) * x.slice(1, inner);
          y.backward(dy.to(at::kDouble));
          EXPECT_TRUE(close(ops::swiglu(gate_up), y, tolerance(type)));
          at::Tensor activation = dy.clone();
          at::Tensor gradient = gate_up.clone();
          EXPECT_FALSE(ops::swiglu_backward_(activation, gradient).defined());
          EXPECT_TRUE(close(gradient, x.grad(), tolerance(type)));
          EXPECT_TRUE(close(activation, y, tolerance(type)));

          // Rows that the projection's output scales: dy is the gradient before the scaling.
          const at::Tensor weights = at::rand({tokens}, options);
          const at::Tensor scale = weights.to(at::kDouble).unsqueeze(1);
          activation = dy.clone();
          gradient = gate_up.clone();
          const at::Tensor dweights = ops::swiglu_backward_(activation, gradient, weights);
          EXPECT_TRUE(close(gradient, x.grad() * scale, tolerance(type)));
          EXPECT_TRUE(close(activation, y * scale, tolerance(type)));
          EXPECT_TRUE(close(dweights, (y * dy).sum(-1), tolerance(type)));
        }
      }
    }
  });
}

TEST(KernelSwiglu, ExtremeGatesStayFinite) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      const auto options = at::TensorOptions().dtype(type);
      at::Tensor gate_up = at::ones({2, 66}, options);
      gate_up.select(0, 0).slice(0, 0, 33).fill_(-2000.0);
      gate_up.select(0, 1).slice(0, 0, 33).fill_(2000.0);
      const at::Tensor y = ops::swiglu(gate_up);
      EXPECT_TRUE(close(y.select(0, 0), at::zeros({33}, options), tolerance(type)));
      EXPECT_TRUE(close(y.select(0, 1), at::full({33}, 2000.0, options), tolerance(type)));
    }
  });
}

TEST(KernelMatmul, ProductsMatchDoublePrecision) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      for (const auto& [rows, inner, outer] : std::vector<std::array<std::int64_t, 3>>{
               {0, 3, 4}, {1, 1, 1}, {5, 17, 9}, {67, 129, 130}, {300, 64, 200}, {33, 600, 70}}) {
        const auto options = at::TensorOptions().dtype(type);
        const at::Tensor x = at::randn({rows, inner}, options);
        const at::Tensor w = at::randn({outer, inner}, options);
        const at::Tensor bias = at::randn({outer}, options);
        const at::Tensor dy = at::randn({rows, outer}, options);
        const at::Tensor xd = x.to(at::kDouble);
        const at::Tensor wd = w.to(at::kDouble);
        const at::Tensor dyd = dy.to(at::kDouble);
        const double limit = tolerance(type);
        EXPECT_TRUE(close(ops::matmul_nt(x, w), xd.matmul(wd.t()), limit));
        EXPECT_TRUE(close(ops::matmul_nt(x, w, bias), xd.matmul(wd.t()) + bias, limit));
        EXPECT_TRUE(close(ops::matmul_nn(dy, w), dyd.matmul(wd), limit));
        at::Tensor y = dy.clone();
        ops::matmul_nt_add_(y, x, w);
        EXPECT_TRUE(close(y, dyd + xd.matmul(wd.t()), limit));
        at::Tensor dx = x.clone();
        ops::matmul_nn_add_(dx, dy, w);
        EXPECT_TRUE(close(dx, xd + dyd.matmul(wd), limit));
        at::Tensor grad = w.clone();
        ops::matmul_tn_add_(grad, dy, x);
        EXPECT_TRUE(close(grad, wd + dyd.t().matmul(xd), limit));
        EXPECT_TRUE(close(ops::column_sum(dy), dyd.sum(0), limit));
      }
    }
  });
}

TEST(KernelMatmul, GroupedProductsMatchOneByOne) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      const auto options = at::TensorOptions().dtype(type);
      const std::vector<std::int64_t> rows = {5, 0, 41, 1, 70};
      const at::Tensor x = at::randn({117, 48}, options);
      const at::Tensor w = at::randn({5, 36, 48}, options);
      const at::Tensor dy = at::randn({117, 36}, options);
      at::Tensor grad = at::randn({5, 36, 48}, options);
      const at::Tensor before = grad.clone();
      const at::Tensor y = ops::grouped_matmul_nt(x, w, rows);
      const at::Tensor dx = ops::grouped_matmul_nn(dy, w, rows);
      ops::grouped_matmul_tn_add_(grad, dy, x, rows);
      std::int64_t begin = 0;
      for (std::int64_t e = 0; e < 5; ++e) {
        const std::int64_t count = rows[static_cast<std::size_t>(e)];
        const at::Tensor xe = x.narrow(0, begin, count).to(at::kDouble);
        const at::Tensor we = w.select(0, e).to(at::kDouble);
        const at::Tensor dye = dy.narrow(0, begin, count).to(at::kDouble);
        EXPECT_TRUE(close(y.narrow(0, begin, count), xe.matmul(we.t()), tolerance(type)));
        EXPECT_TRUE(close(dx.narrow(0, begin, count), dye.matmul(we), tolerance(type)));
        EXPECT_TRUE(
            close(grad.select(0, e), before.select(0, e) + dye.t().matmul(xe), tolerance(type)));
        begin += count;
      }
    }
  });
}

TEST(KernelChecks, MistakesAreNamed) {
  const at::Tensor x = at::zeros({4, 6});
  EXPECT_THROW(ops::set_cpu_level("sse9"), InvalidArgument);
  EXPECT_THROW((void)ops::rms_norm(x, at::zeros({5}), kEps), InvalidArgument);
  EXPECT_THROW((void)ops::swiglu(at::zeros({4, 5})), InvalidArgument);
  EXPECT_THROW((void)ops::matmul_nt(x, at::zeros({3, 7})), InvalidArgument);
  EXPECT_THROW(
      (void)ops::grouped_matmul_nt(x, at::zeros({2, 3, 6}), std::vector<std::int64_t>{1, 2}),
      InvalidArgument);
  try {
    (void)ops::rms_norm(x, at::zeros({5}), kEps);
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "[ops.rms_norm] weight has shape [5], expected [6]");
  }
}

}  // namespace meshloom::model
