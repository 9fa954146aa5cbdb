#include "meshloom/model/pretrained.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "file_limit.h"
#include "files.h"
#include "meshloom/core/error.h"
#include "tiny_models.h"

namespace meshloom::model {
namespace {

at::Tensor load(const std::string& folder, const TinyModel& model, at::ScalarType dtype) {
  at::Tensor values = at::full({model.table.elements}, -7.0, at::TensorOptions().dtype(dtype));
  load_pretrained(folder, model.config, model.table, values);
  return values;
}

std::set<std::string> files_of(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    names.insert(file.path().filename().string());
  }
  return names;
}

std::map<std::string, std::string> contents_of(const std::string& folder) {
  std::map<std::string, std::string> contents;
  for (const std::string& name : files_of(folder)) {
    contents[name] = read_bytes(folder + "/" + name);
  }
  return contents;
}

TEST(Pretrained, SavedFoldersLoadTheSameWholeAndInShards) {
  for (const char* text : {kTinyMoe, kTinyMixtral, kTinyTied, kTinyLatent}) {
    const TinyModel model(text);
    for (const std::int64_t limit : {std::int64_t{1} << 30, std::int64_t{2000}, std::int64_t{1}}) {
      SCOPED_TRACE(model.config.model_type + " " + std::to_string(limit));
      const TemporaryFolder folder;
      save_pretrained(folder.path(), model.config, model.table, model.values,
                      {.dtype = at::kDouble, .max_shard_bytes = limit});
      EXPECT_TRUE(at::equal(load(folder.path(), model, at::kDouble), model.values));
      const ModelConfig again = ModelConfig::load(folder.file("config.json"));
      EXPECT_EQ(again.dtype, "float64");
      EXPECT_EQ(again.parameter_count(), model.table.elements);
      const bool sharded = files_of(folder.path()).contains("model.safetensors.index.json");
      EXPECT_EQ(sharded, limit < 1 << 30);
      if (limit == 1) {  // a tensor a file
        EXPECT_EQ(files_of(folder.path()).size(), model.table.parameters.size() + 2);
      }
    }
  }
}

TEST(Pretrained, StoredTypesRoundOnceAndConvertOnLoading) {
  const TinyModel model(kTinyTied);
  for (const auto type : {at::kBFloat16, at::kHalf, at::kFloat}) {
    const TemporaryFolder folder;
    save_pretrained(folder.path(), model.config, model.table, model.values, {.dtype = type});
    EXPECT_TRUE(
        at::equal(load(folder.path(), model, at::kDouble), model.values.to(type).to(at::kDouble)));
  }
  const TemporaryFolder folder;
  EXPECT_THROW(
      save_pretrained(folder.path(), model.config, model.table, model.values, {.dtype = at::kInt}),
      NotSupported);
  EXPECT_TRUE(files_of(folder.path()).empty());
}

TEST(Pretrained, AStageTakesItsLayersAndLeavesTheRest) {
  const TinyModel model(kTinyMoe);
  const TemporaryFolder folder;
  save_pretrained(folder.path(), model.config, model.table, model.values, {.dtype = at::kDouble});
  for (const bool first : {true, false}) {
    const auto layers = first ? std::pair<std::int64_t, std::int64_t>{0, 1}
                              : std::pair<std::int64_t, std::int64_t>{1, 2};
    const ParameterTable table = parameter_table(model.config, layers, first, !first);
    at::Tensor values = at::zeros({table.elements}, at::kDouble);
    load_pretrained(folder.path(), model.config, table, values);
    for (const ParameterSpec& spec : table.parameters) {
      const ParameterSpec& whole = model.table.find(spec.name);
      EXPECT_TRUE(at::equal(values.narrow(0, spec.offset, spec.elements()),
                            model.values.narrow(0, whole.offset, whole.elements())))
          << spec.name;
    }
  }
}

TEST(Pretrained, LayersForMultiTokenPredictionArePassedOver) {
  const TinyModel model(kTinyLatent);
  const TemporaryFolder folder;
  save_pretrained(folder.path(), model.config, model.table, model.values, {.dtype = at::kDouble});
  NamedTensors tensors;
  for (const auto& [name, tensor] : load_safetensors(folder.file("model.safetensors"))) {
    tensors.emplace_back(name, tensor.clone());
  }
  tensors.emplace_back("model.layers.2.eh_proj.weight", at::zeros({12, 24}, at::kDouble));
  save_safetensors(folder.file("model.safetensors"), tensors);
  const auto load_with = [&](std::int64_t prediction_layers) {
    ModelConfig config = model.config;
    config.prediction_layers = prediction_layers;
    at::Tensor values = at::zeros({model.table.elements}, at::kDouble);
    load_pretrained(folder.path(), config, model.table, values);
    return values;
  };
  EXPECT_TRUE(at::equal(load_with(1), model.values));
  EXPECT_THROW((void)load_with(0), DataError);
}

TEST(Pretrained, SavingOverAnotherFormLeavesNoStaleWeights) {
  const TinyModel model(kTinyTied);
  const TemporaryFolder folder;
  const auto save = [&](std::int64_t limit) {
    save_pretrained(folder.path(), model.config, model.table, model.values,
                    {.dtype = at::kDouble, .max_shard_bytes = limit});
  };
  write_bytes(folder.file("tokenizer.json"), "{}");
  for (const std::int64_t limit : {std::int64_t{1}, std::int64_t{1} << 30, std::int64_t{2000}}) {
    save(limit);
    EXPECT_TRUE(at::equal(load(folder.path(), model, at::kDouble), model.values)) << limit;
    EXPECT_TRUE(files_of(folder.path()).contains("tokenizer.json"));
  }
  save(std::int64_t{1} << 30);
  EXPECT_EQ(files_of(folder.path()),
            (std::set<std::string>{"config.json", "model.safetensors", "tokenizer.json"}));
}

TEST(Pretrained, FullDiskWhileSavingLeavesTheFormerFolderWhole) {
  const TinyModel model(kTinyMoe);
  for (const std::int64_t limit : {std::int64_t{1} << 30, std::int64_t{3000}}) {
    const TemporaryFolder folder;
    save_pretrained(folder.path(), model.config, model.table, model.values,
                    {.dtype = at::kDouble, .max_shard_bytes = limit});
    const auto former = contents_of(folder.path());
    const at::Tensor other = model.values.add(1.0);
    std::vector<std::string> messages;
    // Nothing fits; some shards do; all weights do, but not the index (or nothing that matters).
    for (const rlim_t bytes : {100, 2500, 3000}) {
      const FileLimit full(bytes);
      messages.push_back(message_of<IoError>([&] {
        save_pretrained(folder.path(), model.config, model.table, other,
                        {.dtype = at::kDouble, .max_shard_bytes = limit});
      }));
    }
    for (const std::string& message : messages) {
      EXPECT_NE(message.find(folder.path() + "/"), std::string::npos) << message;
      EXPECT_NE(message.find("cannot write"), std::string::npos) << message;
    }
    EXPECT_EQ(contents_of(folder.path()), former) << limit;
  }
}

/// Saves a good folder, lets `spoil` change its tensors, and returns what loading it says.
template <class Failure>
std::string spoilt_message(const char* text, const std::function<void(NamedTensors&)>& spoil) {
  const TinyModel model(text);
  const TemporaryFolder folder;
  save_pretrained(folder.path(), model.config, model.table, model.values, {.dtype = at::kDouble});
  NamedTensors tensors;
  for (const auto& [name, tensor] : load_safetensors(folder.file("model.safetensors"))) {
    tensors.emplace_back(name, tensor.clone());
  }
  spoil(tensors);
  save_safetensors(folder.file("model.safetensors"), tensors);
  const std::string message =
      message_of<Failure>([&] { (void)load(folder.path(), model, at::kDouble); });
  EXPECT_NE(message.find(folder.path()), std::string::npos) << "no folder in: " << message;
  return message;
}

at::Tensor& tensor_of(NamedTensors& tensors, const std::string& name) {
  for (auto& [key, tensor] : tensors) {
    if (key == name) return tensor;
  }
  throw InvalidArgument("test", "no tensor " + name);
}

#define EXPECT_SAYS(message, part) EXPECT_NE((message).find(part), std::string::npos) << (message)

TEST(Pretrained, TensorsThatDoNotFitTheModelAreNamed) {
  const std::string norm = "model.layers.1.input_layernorm.weight";
  EXPECT_SAYS(spoilt_message<DataError>(kTinyMoe,
                                        [&](NamedTensors& t) {
                                          std::erase_if(t, [&](const auto& entry) {
                                            return entry.first == norm;
                                          });
                                        }),
              "1 tensor(s) missing: " + norm);
  EXPECT_SAYS(spoilt_message<DataError>(kTinyMoe, [](NamedTensors& t) { t.clear(); }),
              "missing: model.embed_tokens.weight");
  EXPECT_SAYS(
      spoilt_message<DataError>(
          kTinyMoe,
          [&](NamedTensors& t) {
            t.emplace_back("model.layers.2.mlp.gate.weight", at::ones({4, 12}, at::kDouble));
          }),
      "unexpected tensor \"model.layers.2.mlp.gate.weight\"");
  EXPECT_SAYS(
      spoilt_message<DataError>(
          kTinyMoe, [&](NamedTensors& t) { tensor_of(t, norm) = at::ones({13}, at::kDouble); }),
      "\"" + norm + "\" has shape [13], expected [12]");
  EXPECT_SAYS(spoilt_message<DataError>(kTinyMoe,
                                        [&](NamedTensors& t) {
                                          auto& q = tensor_of(
                                              t, "model.layers.0.self_attn.q_proj.weight");
                                          q = q.t().contiguous();
                                        }),
              "\"model.layers.0.self_attn.q_proj.weight\" has shape [12, 18], expected [18, 12]");
  EXPECT_SAYS(
      spoilt_message<DataError>(
          kTinyMoe, [&](NamedTensors& t) { tensor_of(t, norm) = at::ones({12}, at::kLong); }),
      "\"" + norm + "\" is of dtype Long, expected floating point");
  // A quantised checkpoint's packed weight: another dtype and another shape.
  EXPECT_SAYS(
      spoilt_message<DataError>(
          kTinyMoe,
          [&](NamedTensors& t) {
            t.emplace_back("model.layers.0.self_attn.q_proj.qweight", at::ones({4, 12}, at::kInt));
          }),
      "unexpected tensor \"model.layers.0.self_attn.q_proj.qweight\"");
  // Experts one by one and fused at once.
  EXPECT_SAYS(spoilt_message<DataError>(kTinyMoe,
                                        [&](NamedTensors& t) {
                                          t.emplace_back("model.layers.1.mlp.experts.down_proj",
                                                         at::ones({4, 12, 7}, at::kDouble));
                                        }),
              "is there under two names");
}

TEST(Pretrained, ATiedHeadMayBeStoredButMustBeTheEmbedding) {
  const auto head = [](NamedTensors& t, double shift) {
    t.emplace_back("lm_head.weight", tensor_of(t, "model.embed_tokens.weight").add(shift));
  };
  const TinyModel model(kTinyTied);
  EXPECT_SAYS(spoilt_message<DataError>(kTinyTied, [&](NamedTensors& t) { head(t, 1e-3); }),
              "lm_head.weight differs from the embedding");
  const TemporaryFolder folder;
  save_pretrained(folder.path(), model.config, model.table, model.values, {.dtype = at::kDouble});
  NamedTensors tensors = load_safetensors(folder.file("model.safetensors"));
  head(tensors, 0.0);
  tensors.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", at::ones({3}, at::kFloat));
  save_safetensors(folder.file("model.safetensors"), tensors);
  EXPECT_TRUE(at::equal(load(folder.path(), model, at::kDouble), model.values));
}

TEST(Pretrained, UnusableFoldersAreNamed) {
  const TinyModel model(kTinyTied);
  const TemporaryFolder folder;
  EXPECT_SAYS(message_of<IoError>([&] { (void)load(folder.file("absent"), model, at::kDouble); }),
              folder.file("absent"));
  EXPECT_SAYS(message_of<InvalidArgument>([&] {
                at::Tensor few = at::zeros({3}, at::kDouble);
                load_pretrained(folder.path(), model.config, model.table, few);
              }),
              "elements of values");
  write_bytes(folder.file("file"), "");
  EXPECT_SAYS(message_of<IoError>([&] {
                save_pretrained(folder.file("file"), model.config, model.table, model.values);
              }),
              folder.file("file"));
}

#undef EXPECT_SAYS

}  // namespace
}  // namespace meshloom::model
