#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "kernels_support.h"
#include "meshloom/core/error.h"
#include "meshloom/model/attention_kernel.h"

namespace meshloom::model {
namespace {

using testing::at_every_level;
using testing::close;
using testing::kernel_types;
using testing::leaf;
using testing::tolerance;

constexpr double kUnseen = -std::numeric_limits<double>::infinity();

struct Case {
  std::int64_t heads, kv_heads, head_dim, window;
  std::vector<std::int64_t> documents;
  std::int64_t v_dim = 0;  ///< 0: head_dim
};

struct Inputs {
  at::Tensor q, k, v, dout;
  AttentionOptions options;
};

Inputs inputs_for(const Case& c, at::ScalarType type) {
  std::int64_t tokens = 0;
  for (const std::int64_t length : c.documents) tokens += length;
  const auto typed = at::TensorOptions().dtype(type);
  const std::int64_t v_dim = c.v_dim > 0 ? c.v_dim : c.head_dim;
  // One fused projection: rows are wider than the heads, as in the model.
  const at::Tensor fused = at::randn({tokens, c.heads + 2 * c.kv_heads, c.head_dim}, typed);
  // Values of another size come with a part of the keys in one row.
  const at::Tensor values = c.v_dim > 0
                                ? at::randn({tokens, c.kv_heads, 5 + v_dim}, typed).slice(2, 5)
                                : fused.slice(1, c.heads + c.kv_heads);
  return {fused.slice(1, 0, c.heads),
          fused.slice(1, c.heads, c.heads + c.kv_heads),
          values,
          at::randn({tokens, c.heads, v_dim}, typed),
          {1.0 / std::sqrt(static_cast<double>(c.head_dim)), c.window}};
}

struct Expected {
  at::Tensor out, lse, dq, dk, dv;
};

/// Dense masked softmax of each document in fp64, with autograd.
Expected reference(const Case& c, const Inputs& in) {
  const at::Tensor q = leaf(in.q);
  const at::Tensor k = leaf(in.k);
  const at::Tensor v = leaf(in.v);
  Expected expected;
  expected.out = at::zeros(in.dout.sizes(), at::kDouble);
  expected.lse = at::full({in.q.size(1), in.q.size(0)}, kUnseen, at::kDouble);
  std::int64_t begin = 0;
  for (const std::int64_t length : c.documents) {
    const std::int64_t n = c.heads / c.kv_heads;
    const auto rows = [&](const at::Tensor& x, std::int64_t repeat) {
      return x.narrow(0, begin, length).transpose(0, 1).repeat_interleave(repeat, 0);
    };
    const at::Tensor scores = rows(q, 1).matmul(rows(k, n).transpose(1, 2)) * in.options.scale;
    const at::Tensor index = at::arange(length, at::kLong);
    at::Tensor hidden = index.unsqueeze(0) > index.unsqueeze(1);
    if (c.window > 0) {
      hidden = hidden.logical_or(index.unsqueeze(0) <= index.unsqueeze(1) - c.window);
    }
    const at::Tensor masked = scores.masked_fill(hidden, kUnseen);
    const at::Tensor out = at::softmax(masked, -1).matmul(rows(v, n)).transpose(0, 1);
    out.backward(in.dout.narrow(0, begin, length).to(at::kDouble));
    expected.out.narrow(0, begin, length).copy_(out.detach());
    expected.lse.narrow(1, begin, length).copy_(at::logsumexp(masked, {2}).detach());
    begin += length;
  }
  const auto grad_or_zero = [](const at::Tensor& x) {
    return x.grad().defined() ? x.grad() : at::zeros_like(x);
  };
  expected.dq = grad_or_zero(q);
  expected.dk = grad_or_zero(k);
  expected.dv = grad_or_zero(v);
  return expected;
}

/// Every document in one block, or cut into pieces of queries and of keys.
std::vector<AttentionBlock> blocks_for(const Case& c, std::int64_t pieces) {
  std::vector<AttentionBlock> blocks;
  std::int64_t begin = 0;
  for (const std::int64_t length : c.documents) {
    for (std::int64_t i = 0; i < pieces; ++i) {
      for (std::int64_t j = 0; j < pieces; ++j) {
        const std::int64_t q0 = length * i / pieces;
        const std::int64_t k0 = length * j / pieces;
        blocks.push_back({begin + q0, length * (i + 1) / pieces - q0, q0, begin + k0,
                          length * (j + 1) / pieces - k0, k0});
      }
    }
    begin += length;
  }
  return blocks;
}

struct Result {
  at::Tensor out, lse, dq, dk, dv;
};

Result run(const Inputs& in, const std::vector<AttentionBlock>& blocks) {
  const at::ScalarType stat = in.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Result r;
  r.out = at::zeros(in.dout.sizes(), stat);
  r.lse = at::full({in.q.size(1), in.q.size(0)}, kUnseen, stat);
  attention_forward_(r.out, r.lse, in.q, in.k, in.v, blocks, in.options);
  r.dq = at::zeros(in.q.sizes(), stat);
  r.dk = at::zeros(in.k.sizes(), stat);
  r.dv = at::zeros(in.v.sizes(), stat);
  const at::Tensor delta = attention_delta(in.dout, r.out);
  attention_backward_(r.dq, r.dk, r.dv, in.dout, in.q, in.k, in.v, r.lse, delta, blocks,
                      in.options);
  return r;
}

void expect_match(const Result& given, const Expected& expected, double limit) {
  EXPECT_TRUE(close(given.out, expected.out, limit)) << "out";
  EXPECT_TRUE(close(given.lse, expected.lse, limit)) << "lse";
  EXPECT_TRUE(close(given.dq, expected.dq, limit)) << "dq";
  EXPECT_TRUE(close(given.dk, expected.dk, limit)) << "dk";
  EXPECT_TRUE(close(given.dv, expected.dv, limit)) << "dv";
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {{1, 1, 32, 0, {1}},
                                        {2, 1, 16, 0, {0, 3, 0, 40}},
                                        {4, 2, 64, 0, {130, 7}},
                                        {8, 2, 32, 0, {300, 65, 1}},
                                        {3, 3, 128, 0, {97}},
                                        {2, 2, 24, 0, {70}},
                                        {2, 1, 7, 0, {50}},
                                        {2, 2, 256, 0, {33, 20}},
                                        {4, 1, 96, 0, {150}},
                                        {4, 2, 32, 1, {90}},
                                        {4, 2, 32, 50, {300, 20, 51}},
                                        {2, 1, 64, 129, {260}},
                                        {2, 2, 80, 17, {100, 17, 18}},
                                        {3, 3, 24, 0, {97, 5}, 16},
                                        {4, 4, 13, 0, {140}, 29},
                                        {4, 2, 96, 60, {150, 3}, 64}};
  return all;
}

}  // namespace

TEST(KernelAttention, WholeDocumentsMatchAutograd) {
  for (const Case& c : cases()) {
    for (const at::ScalarType type : kernel_types()) {
      SCOPED_TRACE("head size " + std::to_string(c.head_dim) + " window " +
                   std::to_string(c.window));
      const Inputs in = inputs_for(c, type);
      const Expected expected = reference(c, in);
      at_every_level([&] { expect_match(run(in, blocks_for(c, 1)), expected, tolerance(type)); });
    }
  }
}

TEST(KernelAttention, BlocksMergeToTheWhole) {
  for (const Case& c : cases()) {
    for (const at::ScalarType type : kernel_types()) {
      SCOPED_TRACE("head size " + std::to_string(c.head_dim) + " window " +
                   std::to_string(c.window));
      const Inputs in = inputs_for(c, type);
      const Expected expected = reference(c, in);
      at_every_level([&] {
        for (const std::int64_t pieces : {2, 3, 5}) {
          expect_match(run(in, blocks_for(c, pieces)), expected, tolerance(type));
        }
      });
    }
  }
}

TEST(KernelAttention, UnseenRowsStayUntouched) {
  at_every_level([] {
    for (const at::ScalarType type : kernel_types()) {
      const Inputs in = inputs_for({2, 1, 32, 0, {80}}, type);
      // Keys that all lie after the queries, and a block without keys.
      const std::vector<AttentionBlock> blocks = {{0, 40, 0, 40, 40, 40}, {40, 40, 40, 0, 0, 0}};
      const Result r = run(in, blocks);
      EXPECT_TRUE(r.out.equal(at::zeros_like(r.out)));
      EXPECT_TRUE(r.lse.equal(at::full_like(r.lse, kUnseen)));
      EXPECT_TRUE(r.dq.equal(at::zeros_like(r.dq)));
      EXPECT_TRUE(r.dk.equal(at::zeros_like(r.dk)));
    }
  });
}

TEST(KernelAttention, BrainFloatIsRoundedOnce) {
  const Case c{4, 2, 32, 0, {120, 9}};
  const Inputs in = inputs_for(c, at::kBFloat16);
  const Expected expected = reference(c, in);
  // Inputs are exact in fp32, all sums are fp32.
  at_every_level([&] {
    const Result r = run(in, blocks_for(c, 1));
    EXPECT_EQ(r.out.scalar_type(), at::kFloat);
    expect_match(r, expected, testing::kTolerance32);
  });
}

TEST(KernelAttention, WrongShapesAreRefused) {
  Inputs in = inputs_for({2, 1, 32, 0, {8}}, at::kFloat);
  at::Tensor out = at::zeros({8, 2, 32});
  at::Tensor lse = at::zeros({2, 8});
  const std::vector<AttentionBlock> outside = {{0, 9, 0, 0, 8, 0}};
  EXPECT_THROW(attention_forward_(out, lse, in.q, in.k, in.v, outside, in.options),
               InvalidArgument);
  at::Tensor narrow = at::zeros({8, 2, 31});
  EXPECT_THROW(attention_forward_(narrow, lse, in.q, in.k, in.v, {}, in.options), InvalidArgument);
  EXPECT_NO_THROW(attention_forward_(narrow, lse, in.q, in.k, in.v.slice(2, 1), {}, in.options));
  at::Tensor wrong = at::zeros({8, 2});
  EXPECT_THROW(attention_forward_(out, wrong, in.q, in.k, in.v, {}, in.options), InvalidArgument);
}

}  // namespace meshloom::model
