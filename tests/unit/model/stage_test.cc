#include "meshloom/model/stage.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>

#include "files.h"
#include "meshloom/core/error.h"
#include "meshloom/model/balance_losses.h"
#include "tiny_models.h"

namespace meshloom::model {
namespace {

/// Everything that one rank needs to run a stage.
struct Runner {
  explicit Runner(const TinyModel& model, std::unique_ptr<Stage> built)
      : stage(std::move(built)),
        gradients(at::zeros({stage->parameters().elements}, at::kDouble)),
        flat(take(model), gradients) {}
  explicit Runner(const TinyModel& model)
      : Runner(model, build_stage(model.config, {0, model.config.layers}, true, true)) {}

  at::Tensor take(const TinyModel& model) const {
    std::vector<at::Tensor> parts;
    for (const ParameterSpec& spec : stage->parameters().parameters) {
      const ParameterSpec& whole = model.table.find(spec.name);
      parts.push_back(model.values.narrow(0, whole.offset, whole.elements()));
    }
    return at::cat(parts);
  }
  StageContext context(const SequenceBatch& batch, bool training = true) {
    StageContext result{batch, batch, flat, attention, dispatcher, linear};
    if (training) {
      result.gradients = &flat;
      result.activations = &activations;
    }
    return result;
  }

  std::unique_ptr<Stage> stage;
  at::Tensor gradients;
  FlatParameters flat;
  LocalAttention attention;
  LocalDispatcher dispatcher;
  LocalLinear linear;
  ResidentActivations activations;
};

TEST(Stage, AMicroBatchWithoutTokensPassesAndLeavesNoGradient) {
  for (const char* text : {kTinyMoe, kTinyMixtral, kTinyTied, kTinyLatent}) {
    const TinyModel model(text);
    Runner runner(model);
    std::vector<SequenceBatch> batches(3);  // undefined tensors; defined ones; an empty document
    batches[1] = make_batch({});
    batches[2] = make_batch({Document{}});
    for (const SequenceBatch& batch : batches) {
      for (const bool training : {true, false}) {
        const StageContext context = runner.context(batch, training);
        const StageOutput output = runner.stage->forward(context, {});
        EXPECT_EQ(output.loss_sum, 0.0);
        EXPECT_EQ(output.z_loss_sum, 0.0);
        if (!training) continue;
        EXPECT_FALSE(runner.stage->backward(context, {}).defined());
      }
    }
    EXPECT_EQ(runner.gradients.abs().max().item<double>(), 0.0) << model.config.model_type;
  }
}

TEST(Stage, PiecesOfAModelWithoutTokensPassEmptyActivationsOn) {
  const TinyModel model(kTinyMoe);
  Runner first(model, build_stage(model.config, {0, 1}, true, false));
  Runner last(model, build_stage(model.config, {1, 2}, false, true));
  const SequenceBatch batch = make_batch({});
  const StageContext at_first = first.context(batch);
  const StageContext at_last = last.context(batch);
  const at::Tensor hidden = first.stage->forward(at_first, {}).hidden;
  EXPECT_EQ(hidden.sizes(), (std::vector<std::int64_t>{0, model.config.hidden_size}));
  EXPECT_EQ(last.stage->forward(at_last, hidden).loss_sum, 0.0);
  const at::Tensor dhidden = last.stage->backward(at_last, {});
  EXPECT_EQ(dhidden.sizes(), hidden.sizes());
  EXPECT_FALSE(first.stage->backward(at_first, dhidden).defined());
}

TEST(Stage, EmptyDocumentsAmongOthersChangeNothing) {
  const TinyModel model(kTinyMoe);
  const auto documents = tiny_documents({5, 11}, model.config.vocab_size);
  const ReferenceStep plain = reference_step(model.config, model.values, documents);
  const ReferenceStep padded = reference_step(
      model.config, model.values, {Document{}, documents[0], Document{}, documents[1], Document{}});
  EXPECT_EQ(padded.loss, plain.loss);
  EXPECT_TRUE(at::equal(padded.gradients, plain.gradients));
}

TEST(Stage, PiecesGiveWhatTheWholeGives) {
  // The same operations in the same order but for sums over the two uses of a tied embedding.
  constexpr double kTolerance = 1e-13;
  for (const char* text : {kTinyMoe, kTinyMixtral, kTinyTied, kTinyLatent}) {
    const TinyModel model(text);
    const SequenceBatch batch = make_batch(tiny_documents({7, 1, 12}, model.config.vocab_size));
    Runner whole(model);
    const StageContext at_whole = whole.context(batch);
    const double loss = whole.stage->forward(at_whole, {}).loss_sum;
    whole.stage->backward(at_whole, {});

    Runner first(model, build_stage(model.config, {0, 1}, true, false));
    Runner last(model, build_stage(model.config, {1, 2}, false, true));
    const StageContext at_first = first.context(batch);
    const StageContext at_last = last.context(batch);
    const at::Tensor hidden = first.stage->forward(at_first, {}).hidden;
    EXPECT_NEAR(last.stage->forward(at_last, hidden).loss_sum, loss, kTolerance * loss);
    first.stage->backward(at_first, last.stage->backward(at_last, {}));
    at::Tensor sum = at::zeros_like(whole.gradients);
    for (Runner* piece : {&first, &last}) {
      for (const ParameterSpec& spec : piece->stage->parameters().parameters) {
        const ParameterSpec& place = model.table.find(spec.name);
        sum.narrow(0, place.offset, place.elements())
            .add_(piece->gradients.narrow(0, spec.offset, spec.elements()));
      }
    }
    EXPECT_LE(sum.sub(whole.gradients).abs().max().item<double>(),
              kTolerance * whole.gradients.abs().max().item<double>())
        << model.config.model_type;
  }
}

TEST(Stage, GradientsAccumulateOverMicroBatches) {
  constexpr double kTolerance = 1e-13;
  const TinyModel model(kTinyMoe);
  const auto documents = tiny_documents({7, 1, 12}, model.config.vocab_size);
  Runner together(model);
  const SequenceBatch all = make_batch(documents);
  const double loss = together.stage->forward(together.context(all), {}).loss_sum;
  together.stage->backward(together.context(all), {});
  Runner apart(model);
  double sum = 0.0;
  for (const Document& document : documents) {
    const SequenceBatch batch = make_batch({document});
    sum += apart.stage->forward(apart.context(batch), {}).loss_sum;
    apart.stage->backward(apart.context(batch), {});
  }
  EXPECT_NEAR(sum, loss, kTolerance * loss);
  EXPECT_LE(apart.gradients.sub(together.gradients).abs().max().item<double>(),
            kTolerance * together.gradients.abs().max().item<double>());
}

TEST(Stage, TokensOutsideTheVocabularyAreRefusedByName) {
  const TinyModel model(kTinyMoe);
  for (const std::int64_t bad :
       {std::int64_t{-1}, model.config.vocab_size, std::int64_t{1} << 40}) {
    auto documents = tiny_documents({5, 9, 4}, model.config.vocab_size);
    documents[1].tokens[6] = bad;
    const std::string message = message_of<InvalidArgument>(
        [&] { (void)reference_step(model.config, model.values, documents); });
    for (const std::string& part :
         std::vector<std::string>{"sample 1", "position 6", std::to_string(bad), "31"}) {
      EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
    }
  }
}

TEST(Stage, MisuseIsRefused) {
  const TinyModel model(kTinyMoe);
  EXPECT_THROW((void)build_stage(model.config, {1, 0}, true, true), InvalidArgument);
  EXPECT_THROW((void)build_stage(model.config, {0, 3}, true, true), InvalidArgument);
  EXPECT_THROW((void)build_stage(model.config, {-1, 1}, true, true), InvalidArgument);
  Runner last(model, build_stage(model.config, {1, 2}, false, true));
  const SequenceBatch batch = make_batch(tiny_documents({5}, 31));
  EXPECT_THROW((void)last.stage->forward(last.context(batch), {}), InvalidArgument);
  const at::Tensor other = at::zeros({4, model.config.hidden_size}, at::kDouble);
  EXPECT_THROW((void)last.stage->forward(last.context(batch), other), InvalidArgument);
  StageContext half = last.context(batch);
  half.activations = nullptr;
  EXPECT_THROW((void)last.stage->forward(half, {}), InvalidArgument);
  EXPECT_THROW((void)reference_step(model.config, model.values, tiny_documents({1, 1}, 31)),
               InvalidArgument);
}

// --- initial values -------------------------------------------------------------------------

TEST(Initialize, ValuesHaveTheStatedMomentsAndKinds) {
  ModelConfig config = ModelConfig::from_json(kTinyMoe);
  config.vocab_size = 5000;
  config.hidden_size = 64;
  const ParameterTable table = parameter_table(config, {0, config.layers}, true, true);
  at::Tensor values = at::full({table.elements}, 99.0, at::kDouble);
  constexpr double kRange = 0.02;
  initialize_(values, table, kRange, 1);
  for (const ParameterSpec& spec : table.parameters) {
    const at::Tensor part = values.narrow(0, spec.offset, spec.elements());
    if (spec.name.find("norm") != std::string::npos) {
      EXPECT_TRUE(part.eq(1.0).all().item<bool>()) << spec.name;
      continue;
    }
    if (spec.name.ends_with("bias")) {
      EXPECT_TRUE(part.eq(0.0).all().item<bool>()) << spec.name;
      continue;
    }
    // Five standard errors of mean, variance and fourth moment of a normal sample.
    const auto n = static_cast<double>(spec.elements());
    const at::Tensor z = part.div(kRange);
    EXPECT_LE(std::abs(z.mean().item<double>()), 5 / std::sqrt(n)) << spec.name;
    EXPECT_LE(std::abs(z.pow(2).mean().item<double>() - 1), 5 * std::sqrt(2 / n)) << spec.name;
    EXPECT_LE(std::abs(z.pow(4).mean().item<double>() - 3), 5 * std::sqrt(96 / n)) << spec.name;
    // Neighbours are independent.
    const at::Tensor pairs =
        z.narrow(0, 0, spec.elements() - 1).mul(z.narrow(0, 1, spec.elements() - 1));
    EXPECT_LE(std::abs(pairs.mean().item<double>()), 5 / std::sqrt(n)) << spec.name;
  }
}

TEST(Initialize, ValuesDependOnSeedNameAndElementAlone) {
  const TinyModel model(kTinyMoe);
  at::Tensor again = at::zeros_like(model.values);
  initialize_(again, model.table, model.config.initializer_range, 5);
  EXPECT_TRUE(at::equal(again, model.values));
  at::Tensor other = at::zeros_like(model.values);
  initialize_(other, model.table, model.config.initializer_range, 6);
  EXPECT_FALSE(at::equal(other, model.values));

  // The last layer alone, as a pipeline stage holds it.
  const ParameterTable stage = parameter_table(model.config, {1, 2}, false, true);
  at::Tensor part = at::zeros({stage.elements}, at::kDouble);
  initialize_(part, stage, model.config.initializer_range, 5);
  for (const ParameterSpec& spec : stage.parameters) {
    const ParameterSpec& whole = model.table.find(spec.name);
    EXPECT_TRUE(at::equal(part.narrow(0, spec.offset, spec.elements()),
                          model.values.narrow(0, whole.offset, whole.elements())))
        << spec.name;
  }
  // Two tensors of one shape differ.
  const auto of = [&](const char* name) {
    const ParameterSpec& spec = model.table.find(name);
    return model.values.narrow(0, spec.offset, spec.elements());
  };
  EXPECT_FALSE(at::equal(of("model.layers.0.self_attn.k_proj.weight"),
                         of("model.layers.0.self_attn.v_proj.weight")));

  for (const auto type : {at::kFloat, at::kBFloat16}) {
    at::Tensor rounded = at::zeros({model.table.elements}, at::TensorOptions().dtype(type));
    initialize_(rounded, model.table, model.config.initializer_range, 5);
    EXPECT_TRUE(at::equal(rounded, model.values.to(type)));
  }
}

}  // namespace
}  // namespace meshloom::model
