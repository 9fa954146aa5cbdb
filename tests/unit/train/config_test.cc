#include "meshloom/train/config.h"

#include <gtest/gtest.h>

#include <string>

#include "meshloom/core/error.h"
#include "unit/temporary_folder.h"

namespace meshloom::train {
namespace {

constexpr const char* kSmall = "global_batch_tokens: 4_096\n";

std::string refusal(const std::string& text) {
  return message_of<DataError>([&] { static_cast<void>(TrainConfig::from_yaml(text, "c.yaml")); });
}

TEST(TrainConfig, EveryKeyReadsAndSurvivesARoundTrip) {
  const TrainConfig config = TrainConfig::from_yaml(R"(
run: "runs/a b"
seed: 7
steps: 20
layout: {hdp: 4}
parallel: {zero: 2, experts: {replan_every: 50, least_gain: 0.1}}
device: cuda:1
dtype: bfloat16
deterministic: true
threads: 3
global_batch_tokens: 1_000_000
capacity_tokens: 65536
strategy: naive_hdp
exchange: "ring:2-4:-8192,auto"
exchange_dtype: bfloat16
cost: {quadratic: 1.5, linear: 20000, fixed: 1e-3, exchange: 0.25}
aux_loss_coefficient: 0.01
aux_loss: sequence
z_loss_coefficient: 1e-3
clip_norm: 0.5
nan_policy: skip
evaluate_every: 5
evaluate_tokens: 1000
timeline_steps: 2
save_plans: false
timeout_seconds: 12.5
model:
  config:
    model_type: llama
    vocab_size: 1_024
    hidden_size: 64
    intermediate_size: 96
    num_hidden_layers: 2
    num_attention_heads: 4
    rms_norm_eps: 1e-5
    tie_word_embeddings: true
    rope_scaling: null
    _name_or_path: "12"
data:
  paths: [a, "b c"]
  weights: [1, 2.5]
  tokenizer: t.model
  vocab_size: 500
  max_document_tokens: 99
  held_out_fraction: 0.05
  cache: /tmp/c
optimizer: {lr: 1e-3, beta1: 0.8, beta2: 0.99, eps: 1e-9, weight_decay: 0.2}
schedule: {kind: linear, warmup: 3, steps: 18, final_fraction: 0.2}
rules:
  - {pattern: "embed", lr_factor: 0.5, weight_decay: 0.0}
  - {pattern: "layers\\.0\\.", frozen: true}
checkpoint: {every_steps: 4, every_minutes: 1.5, keep: 3, resume: false}
)",
                                                    "c.yaml");
  EXPECT_EQ(config.run, "runs/a b");
  EXPECT_EQ(config.layout.hdp, 4);
  EXPECT_EQ(config.parallel.zero, 2);
  EXPECT_EQ(config.parallel.experts.replan_every, 50);
  EXPECT_EQ(config.parallel.experts.least_gain, 0.1);
  EXPECT_EQ(config.global_batch_tokens, 1'000'000);
  ASSERT_TRUE(config.cost.has_value());
  EXPECT_EQ(config.cost->exchange, 0.25);
  EXPECT_EQ(config.exchange, "ring:2-4:-8192,auto");
  EXPECT_EQ(config.exchange_dtype, "bfloat16");
  EXPECT_EQ(config.model.preset,
            R"({"model_type":"llama","vocab_size":1024,"hidden_size":64,"intermediate_size":96,)"
            R"("num_hidden_layers":2,"num_attention_heads":4,"rms_norm_eps":1e-05,)"
            R"("tie_word_embeddings":true,"rope_scaling":null,"_name_or_path":"12"})");
  EXPECT_EQ(config.data.weights[1], 2.5);
  EXPECT_EQ(config.rules.size(), 2U);
  EXPECT_EQ(config.rules[0].weight_decay, 0.0);
  EXPECT_FALSE(config.rules[1].weight_decay.has_value());
  EXPECT_TRUE(config.rules[1].frozen);
  EXPECT_EQ(config.checkpoint.resume, "no");

  const std::string text = config.to_yaml();
  const TrainConfig again = TrainConfig::from_yaml(text, "again");
  EXPECT_EQ(again.to_yaml(), text);
  EXPECT_EQ(again.model.preset, config.model.preset);
  EXPECT_EQ(again.optimizer.lr, config.optimizer.lr);
  EXPECT_EQ(again.rules[1].pattern, "layers\\.0\\.");
}

TEST(TrainConfig, UnknownKeyIsRefusedWithItsLineAndTheNearestOne) {
  EXPECT_EQ(refusal(std::string(kSmall) + "optimizer:\n  lrate: 1\n"),
            "[train.config] c.yaml:3: optimizer.lrate: unknown key; did you mean \"lr\"?");
  EXPECT_NE(refusal(std::string(kSmall) + "global_batch_token: 3\n").find("global_batch_tokens"),
            std::string::npos);
}

TEST(TrainConfig, WrongTypesAndRangesNameKeyAndLine) {
  EXPECT_EQ(refusal(std::string(kSmall) + "steps: many\n"),
            "[train.config] c.yaml:2: steps: expected an integer, got \"many\"");
  EXPECT_EQ(refusal(std::string(kSmall) + "steps: 1.5\n"),
            "[train.config] c.yaml:2: steps: expected an integer, got \"1.5\"");
  EXPECT_EQ(refusal(std::string(kSmall) + "steps: \"3\"\n"),
            "[train.config] c.yaml:2: steps: expected an integer, got \"3\"");
  EXPECT_EQ(refusal(std::string(kSmall) + "clip_norm: .nan\n"),
            "[train.config] c.yaml:2: clip_norm: expected a number, got \".nan\"");
  EXPECT_EQ(refusal(std::string(kSmall) + "optimizer: 3\n"),
            "[train.config] c.yaml:2: optimizer: expected a mapping of keys, got a scalar");
  EXPECT_EQ(refusal(std::string(kSmall) + "schedule:\n  kind: cosin\n"),
            "[train.config] c.yaml:3: schedule.kind: got \"cosin\", expected one of: cosine, "
            "linear, constant");
  EXPECT_EQ(refusal(std::string(kSmall) + "data:\n  held_out_fraction: 1.0\n"),
            "[train.config] c.yaml:3: data.held_out_fraction: got 1, expected 0 <= x < 1");
  EXPECT_EQ(refusal(std::string(kSmall) + "seed: 1\nseed: 2\n"),
            "[train.config] c.yaml:3: seed: the key is given twice");
  EXPECT_NE(refusal(std::string(kSmall) + "rules: [{pattern: \"(\"}]\n").find("rules[0].pattern"),
            std::string::npos);
  EXPECT_NE(refusal(std::string(kSmall) + "run:\n").find("has no value"), std::string::npos);
}

TEST(TrainConfig, InlineModelNamesKeyAndLine) {
  const std::string start = std::string(kSmall) +
                            "model:\n"
                            "  config:\n"
                            "    model_type: llama\n"
                            "    vocab_size: 64\n"
                            "    hidden_size: 32\n"
                            "    intermediate_size: 48\n"
                            "    num_hidden_layers: 2\n"
                            "    num_attention_heads: 4\n";
  EXPECT_NO_THROW(static_cast<void>(TrainConfig::from_yaml(start, "c.yaml")));
  EXPECT_EQ(refusal(start + "    head_dim: seven\n"),
            "[train.config] c.yaml:10: model.config.head_dim: head_dim is \"seven\", expected a "
            "positive integer up to 2147483647");
  EXPECT_EQ(refusal(start + "    num_key_value_heads: 3\n"),
            "[train.config] c.yaml:9: model.config.num_attention_heads: num_attention_heads is 4, "
            "expected a multiple of num_key_value_heads 3");
  EXPECT_EQ(refusal(start + "    vocab_size: 65\n"),
            "[train.config] c.yaml:10: model.config.vocab_size: the key is given twice");
  // Inside a mapping inside; and what is missing is said at the mapping.
  EXPECT_EQ(refusal(start + "    rope_scaling:\n      rope_type: linear\n      factor: two\n"),
            "[train.config] c.yaml:12: model.config.rope_scaling.factor: rope_scaling.factor is "
            "\"two\", expected a number");
  EXPECT_EQ(refusal(std::string(kSmall) + "model:\n  config: {model_type: llama}\n"),
            "[train.config] c.yaml:3: model.config: vocab_size is missing");
  EXPECT_EQ(
      message_of<NotSupported>([&] {
        static_cast<void>(TrainConfig::from_yaml(start + "    attention_sinks: 4\n", "c.yaml"));
      }),
      "[train.config] c.yaml:10: model.config.attention_sinks: key \"attention_sinks\" = 4 is "
      "not built");
}

TEST(TrainConfig, TextThatIsNoYamlNamesTheLine) {
  EXPECT_NE(refusal("steps: 1\nrun: [a\n").find("c.yaml:3: not YAML"), std::string::npos);
  EXPECT_NE(refusal("").find("expected a mapping"), std::string::npos);
}

TEST(TrainConfig, MissingFileIsAnIoErrorThatNamesIt) {
  EXPECT_NE(message_of<IoError>([] {
              static_cast<void>(TrainConfig::load("/nowhere/c.yaml"));
            }).find("/nowhere/c.yaml"),
            std::string::npos);
}

TEST(TrainConfig, ResolveFillsLayoutAndCapacity) {
  TrainConfig config = TrainConfig::from_yaml("global_batch_tokens: 4097", "c");
  config.resolve(4);
  EXPECT_EQ(config.layout.hdp, 4);
  EXPECT_EQ(config.capacity_tokens, 1025);
  config.data.max_document_tokens = 4101;
  EXPECT_NE(message_of<InvalidArgument>([&] {
              config.resolve(4);
            }).find("4101 tokens (data.max_document_tokens)"),
            std::string::npos);
  EXPECT_NE(message_of<InvalidArgument>([&] { config.resolve(3); }).find("needs 4 ranks"),
            std::string::npos);
}

TEST(TrainConfig, WithOffloadTheAxisHoldsMore) {
  TrainConfig config = TrainConfig::from_yaml(
      "{global_batch_tokens: 4000, capacity_tokens: 500, offload: {enabled: true}}", "c");
  EXPECT_EQ(config.memory(32).layers, 32);
  EXPECT_EQ(config.memory(32).resident_layers, 2);
  // Two of four layers stay: twice what fits without.
  EXPECT_NO_THROW(config.resolve(4, 4));
  config.layout = {.hdp = 0};
  EXPECT_NE(message_of<InvalidArgument>([&] { config.resolve(3, 4); }).find("the axis holds 3000"),
            std::string::npos);
  config.offload.enabled = false;
  config.layout = {.hdp = 0};
  EXPECT_EQ(config.memory(32).layers, 0);
  EXPECT_NE(message_of<InvalidArgument>([&] { config.resolve(4, 4); }).find("the axis holds 2000"),
            std::string::npos);
}

TEST(TrainConfig, ModelSectionHasToSayAModel) {
  const TrainConfig config = TrainConfig::from_yaml(kSmall, "c");
  EXPECT_NE(message_of<InvalidArgument>([&] {
              static_cast<void>(load_model_config(config));
            }).find("model.path"),
            std::string::npos);
  EXPECT_NE(refusal(std::string(kSmall) + "model: {path: a, config: b}\n").find("only one"),
            std::string::npos);
}

}  // namespace
}  // namespace meshloom::train
