#include "meshloom/train/open_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "meshloom/core/error.h"
#include "meshloom/core/hash.h"
#include "meshloom/data/sources.h"
#include "meshloom/data/token_cache.h"
#include "train/internal/collective.h"

namespace meshloom::train {
namespace {

namespace fs = std::filesystem;

bool is_jsonl(const std::string& path) { return fs::path(path).extension() == ".jsonl"; }

/// What is on disk for each of the config's paths; nothing for .jsonl files.
using Listings = std::vector<std::optional<data::TextListing>>;

data::TextFolderOptions text_options(const DataSection& section) {
  data::TextFolderOptions options;
  options.extensions = section.extensions;
  options.invalid_utf8 =
      section.invalid_utf8 == "skip" ? data::InvalidText::kSkip : data::InvalidText::kError;
  return options;
}

Listings list_corpus(const DataSection& section) {
  Listings listings;
  for (const std::string& path : section.paths) {
    auto& listing = listings.emplace_back();
    if (!is_jsonl(path)) listing = data::list_text_files({path}, text_options(section));
  }
  return listings;
}

/// What of the corpus is text to train a tokenizer on, and a name that changes with it.
struct Corpus {
  std::vector<std::string> files;
  std::string fingerprint;
};

Corpus corpus_of(const DataSection& section, const Listings& listings) {
  Corpus corpus;
  std::string key;
  for (std::size_t i = 0; i < listings.size(); ++i) {
    if (!listings[i]) {
      std::error_code ignored;
      corpus.files.push_back(section.paths[i]);
      key += fmt::format("{}:{};", section.paths[i], fs::file_size(section.paths[i], ignored));
      continue;
    }
    for (const auto& file : listings[i]->files) {
      corpus.files.push_back(file.path);
      key += fmt::format("{}:{};", file.key, file.bytes);
    }
  }
  corpus.fingerprint = fmt::format("{:016x}", hash_bytes(key));
  return corpus;
}

std::string cache_folder(const TrainConfig& config) {
  return config.data.cache.empty() ? (fs::path(config.run) / "cache").string() : config.data.cache;
}

/// Trains a tokenizer where the cache holds none for this corpus. @returns its file.
std::string cached_tokenizer(const TrainConfig& config, const Listings& listings,
                             std::int64_t vocab_size) {
  const Corpus corpus = corpus_of(config.data, listings);
  const fs::path folder = cache_folder(config);
  const fs::path file =
      folder / fmt::format("tokenizer-{}-{}.model", vocab_size, corpus.fingerprint);
  std::error_code failure;
  if (fs::exists(file, failure)) return file.string();
  fs::create_directories(folder, failure);
  if (failure) {
    throw IoError("train.open_data", fmt::format("cannot make the cache folder {}: {}",
                                                 folder.string(), failure.message()));
  }
  data::TokenizerTraining options;
  options.vocab_size = vocab_size;
  options.seed = config.seed;
  data::train_sentencepiece(corpus.files, file.string(), options);
  return file.string();
}

/// The tokenizer that belongs to pretrained weights; empty where their folder holds none, which
/// serves lines of tokens alone.
std::string pretrained_tokenizer(const TrainConfig& config) {
  const fs::path folder = config.model.path;
  for (const char* name : {"tokenizer.json", "tokenizer.model"}) {
    if (fs::exists(folder / name)) return (folder / name).string();
  }
  for (const std::string& path : config.data.paths) {
    if (is_jsonl(path)) continue;
    throw InvalidArgument(
        "train.open_data",
        fmt::format("{} is text and {} holds no tokenizer.json or tokenizer.model: "
                    "set data.tokenizer to the one that the weights were trained "
                    "with",
                    path, folder.string()));
  }
  return "";
}

/// What the config asks for, on rank 0.
std::string choose_tokenizer(const TrainConfig& config, const Listings& listings,
                             std::int64_t vocab_size) {
  std::string file = config.data.tokenizer;
  if (file.empty() && !config.model.path.empty()) file = pretrained_tokenizer(config);
  if (file.empty() && config.model.path.empty()) {
    file = cached_tokenizer(config, listings, std::min(config.data.vocab_size, vocab_size));
  }
  if (fs::path(file).extension() == ".json") {
    throw NotSupported("train.open_data",
                       fmt::format("{} is read by Python's `tokenizers`; train from Python or with "
                                   "`meshloom train`, or give a SentencePiece model",
                                   file));
  }
  return file;
}

std::shared_ptr<data::Source> open_source(const DataSection& section, std::size_t path,
                                          Listings& listings,
                                          const std::shared_ptr<data::Tokenizer>& tokenizer) {
  const data::TextFolderOptions options = text_options(section);
  if (!listings[path]) return data::jsonl({section.paths[path]}, tokenizer, options);
  return data::text_files(std::move(*listings[path]), tokenizer, options);
}

std::shared_ptr<data::Loader> make_loader(const TrainConfig& config, Listings listings,
                                          std::int64_t vocab_size,
                                          const std::shared_ptr<data::Tokenizer>& tokenizer) {
  if (tokenizer && tokenizer->vocab_size() > vocab_size) {
    throw InvalidArgument(
        "train.open_data",
        fmt::format("the tokenizer {} has {} tokens, but the model's vocab_size is {}",
                    config.data.tokenizer, tokenizer->vocab_size(), vocab_size));
  }
  std::vector<std::shared_ptr<data::Source>> sources;
  const auto cache =
      std::make_shared<data::TokenCache>((fs::path(cache_folder(config)) / "tokens").string());
  for (std::size_t i = 0; i < listings.size(); ++i) {
    sources.push_back(data::cached(open_source(config.data, i, listings, tokenizer), cache));
  }
  std::vector<data::WeightedSource> weighted;
  if (config.data.weights.empty()) {  // by size: every document equally likely
    weighted.push_back(
        {sources.size() == 1 ? sources.front() : data::concatenate(std::move(sources))});
  } else {
    for (std::size_t i = 0; i < sources.size(); ++i) {
      weighted.push_back({sources[i], config.data.weights[i]});
    }
  }
  data::LoaderOptions options;
  options.global_batch_tokens = config.global_batch_tokens;
  options.max_document_tokens = config.data.max_document_tokens;
  options.seed = config.seed;
  options.held_out_fraction = config.data.held_out_fraction;
  options.vocab_size = vocab_size;
  options.timeout =
      std::chrono::milliseconds(static_cast<std::int64_t>(config.timeout_seconds * 1e3));
  return std::make_shared<data::Loader>(std::move(weighted), options);
}

}  // namespace

std::shared_ptr<data::Loader> open_data(const TrainConfig& config, std::int64_t vocab_size,
                                        comm::Communicator world,
                                        std::shared_ptr<data::Tokenizer> tokenizer) {
  if (config.data.paths.empty()) {
    throw InvalidArgument("train.open_data", "data.paths is empty, expected folders or files");
  }
  Listings listings;
  std::string file;
  std::optional<detail::LocalFailure> failure;
  try {
    listings = list_corpus(config.data);
    if (!tokenizer && world.rank() == 0) file = choose_tokenizer(config, listings, vocab_size);
  } catch (const std::exception&) {
    failure = detail::current_failure();
  }
  detail::agree(world, "train.open_data", failure);
  file = detail::broadcast_text(world, file, 0);
  std::shared_ptr<data::Loader> loader;
  try {
    if (!file.empty()) tokenizer = data::load_sentencepiece(file);
    loader = make_loader(config, std::move(listings), vocab_size, tokenizer);
  } catch (const std::exception&) {
    failure = detail::current_failure();
  }
  detail::agree(world, "train.open_data", failure);
  return loader;
}

}  // namespace meshloom::train
