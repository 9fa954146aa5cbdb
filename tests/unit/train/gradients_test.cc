#include "meshloom/train/gradients.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/model/pretrained.h"
#include "meshloom/model/reference.h"
#include "meshloom/model/safetensors.h"
#include "tiny_run.h"
#include "unit/temporary_folder.h"

namespace meshloom::train {
namespace {

// DESIGN.md: fp64 within 1e-10 of each tensor's largest element.
constexpr double kParity = 1e-10;

std::vector<data::Document> awkward_documents() {
  std::vector<data::Document> documents;
  for (const std::int64_t length : {1, 2, 3, 13, 97, 211, 40, 7, 1}) {
    data::Document document;
    for (std::int64_t t = 0; t < length; ++t) {
      document.tokens.push_back(static_cast<std::int32_t>((t * t + 3 * length) % kTinyVocabulary));
    }
    documents.push_back(std::move(document));
  }
  documents[6].loss_mask.assign(40, 0);
  documents[6].loss_mask[17] = 1;
  documents[6].loss_mask[39] = 1;
  return documents;
}

struct Reference {
  double loss = 0.0;
  model::NamedTensors gradients;
};

/// Saves the model in fp64 and computes the step in one piece on one rank.
Reference save_and_solve(const std::string& folder, const model::ModelConfig& config,
                         const std::vector<data::Document>& documents, double balance) {
  const model::ParameterTable table =
      model::parameter_table(config, {0, config.layers}, true, true);
  at::Tensor values = at::zeros({table.elements}, at::kDouble);
  model::initialize_(values, table, 0.2, 9);
  model::SaveOptions options;
  options.dtype = at::kDouble;
  model::save_pretrained(folder, config, table, values, options);
  std::vector<model::Document> plain;
  for (const data::Document& document : documents) {
    model::Document entry;
    entry.tokens.assign(document.tokens.begin(), document.tokens.end());
    entry.loss_mask.assign(document.loss_mask.begin(), document.loss_mask.end());
    plain.push_back(std::move(entry));
  }
  model::ReferenceOptions reference;
  reference.balance_coefficient = balance;
  const model::ReferenceStep step = model::reference_step(config, values, plain, reference);
  return {step.loss, model::views_like_checkpoint(folder, config, table, step.gradients)};
}

void expect_equal(const GradientsResult& result, const Reference& expected,
                  const std::string& what) {
  EXPECT_NEAR(result.loss, expected.loss, kParity * expected.loss) << what;
  ASSERT_EQ(result.names.size(), expected.gradients.size());
  for (std::size_t i = 0; i < result.names.size(); ++i) {
    const auto& [name, gradient] = expected.gradients[i];
    ASSERT_EQ(result.names[i], name);
    ASSERT_EQ(result.gradients[i].sizes(), gradient.sizes());
    const double largest = gradient.abs().max().item<double>();
    const double difference = result.gradients[i].sub(gradient).abs().max().item<double>();
    EXPECT_LE(difference, kParity * std::max(largest, 1e-6)) << what << ' ' << name;
  }
}

TEST(Gradients, EveryLayoutEqualsOneRank) {
  const std::vector<data::Document> documents = awkward_documents();
  for (const bool moe : {false, true}) {
    const TemporaryFolder folder;
    const model::ModelConfig config = moe ? tiny_moe() : tiny_dense();
    const Reference expected = save_and_solve(folder.path(), config, documents, moe ? 0.02 : 0.0);
    for (const int ranks : {1, 2, 3, 4, 5, 7, 8}) {
      for (const char* strategy : {"static", "naive_hdp", "balanced"}) {
        GradientsOptions options;
        options.model = folder.path();
        options.strategy = strategy;
        options.aux_loss = moe;
        // The longest document then fills the whole axis.
        options.capacity_tokens = (211 + ranks - 1) / ranks;
        comm::run_thread_ranks(ranks, [&](comm::Communicator world) {
          const GradientsResult result = gradients(options, documents, world);
          EXPECT_EQ(result.plan.layout.hdp, ranks);
          if (world.rank() == ranks - 1) {
            expect_equal(result, expected, std::string(strategy) + " " + std::to_string(ranks));
          }
        });
      }
    }
  }
}

TEST(Gradients, GivenPlanRunsAndOthersAreRefused) {
  const std::vector<data::Document> documents = awkward_documents();
  const TemporaryFolder folder;
  const Reference expected = save_and_solve(folder.path(), tiny_dense(), documents, 0.0);
  plan::StepPlan plan;
  plan.strategy = "by hand";
  plan.layout = Layout{.hdp = 3};
  plan.capacity_tokens = 375;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    plan.samples.push_back({.id = static_cast<std::int64_t>(i),
                            .tokens = static_cast<std::int64_t>(documents[i].tokens.size()),
                            .loss_tokens = documents[i].loss_tokens()});
  }
  using plan::Exchange;
  plan.slots = {
      {{{.ranks = {2, 0}, .samples = {5, 0}, .exchange = Exchange::kRing},
        {.ranks = {1}, .samples = {1, 2, 3}, .exchange = Exchange::kLocal}}},
      {{{.ranks = {1, 2, 0}, .samples = {4, 8, 6, 7}, .exchange = Exchange::kRing}}},
  };
  plan::predict_(plan);
  const auto run = [&](int ranks) {
    GradientsOptions options;
    options.model = folder.path();
    options.plan = plan;
    comm::run_thread_ranks(ranks, [&](comm::Communicator world) {
      expect_equal(gradients(options, documents, world), expected, "by hand");
    });
  };
  run(3);
  EXPECT_NE(message_of<PlanError>([&] { run(2); }).find("layout"), std::string::npos);
  plan.slots[1].units[0].samples = {4, 8, 6};
  EXPECT_NE(message_of<PlanError>([&] { run(3); }).find("7"), std::string::npos);
  plan.slots[1].units[0].samples = {4, 8, 6, 7};
  plan.samples[4].tokens = 96;
  EXPECT_NE(message_of<PlanError>([&] { run(3); }).find("sample 4 has 96 tokens"),
            std::string::npos);
}

TEST(Gradients, FileHoldsTheFoldersNamesAndTheLoss) {
  const std::vector<data::Document> documents = awkward_documents();
  const TemporaryFolder folder;
  static_cast<void>(save_and_solve(folder.path(), tiny_dense(), documents, 0.0));
  GradientsOptions options;
  options.model = folder.path();
  comm::run_thread_ranks(1, [&](comm::Communicator world) {
    const GradientsResult result = gradients(options, documents, world);
    save_gradients(result, folder.file("out.safetensors"));
    const model::SafetensorsFile written(folder.file("out.safetensors"));
    EXPECT_EQ(written.tensors().size(), result.names.size() + 1);
    EXPECT_EQ(written.tensor("loss").dim(), 0);
    EXPECT_EQ(written.tensor("loss").item<double>(), result.loss);
  });
}

TEST(Gradients, NothingToLearnIsRefused) {
  const TemporaryFolder folder;
  const std::vector<data::Document> documents = {{.tokens = {1}, .loss_mask = {}}};
  static_cast<void>(save_and_solve(folder.path(), tiny_dense(), awkward_documents(), 0.0));
  GradientsOptions options;
  options.model = folder.path();
  EXPECT_NE(message_of<InvalidArgument>([&] {
              comm::run_thread_ranks(2, [&](comm::Communicator world) {
                static_cast<void>(gradients(options, documents, world));
              });
            }).find("loss token"),
            std::string::npos);
  options.model = folder.file("nowhere");
  EXPECT_NE(message_of<IoError>([&] {
              comm::run_thread_ranks(2, [&](comm::Communicator world) {
                static_cast<void>(gradients(options, awkward_documents(), world));
              });
            }).find("nowhere/config.json"),
            std::string::npos);
}

}  // namespace
}  // namespace meshloom::train
