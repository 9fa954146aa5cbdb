// Meshloom's side of train_step.py: the trainer on documents from a file, one step whenever a line
// comes in. Under mpirun rank 0 reads the lines.
//
//   step_benchmark MODEL_FOLDER DOCUMENTS.jsonl THREADS [LAYOUT ZERO CAPACITY_TOKENS]
//
// Prints an object a step: wall seconds, CPU seconds of this process, loss, tokens; and at the end
// of its input one with the peak resident memory.
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "meshloom/comm/backends.h"
#include "meshloom/core/environment.h"
#include "meshloom/data/loader.h"
#include "meshloom/data/sources.h"
#include "meshloom/model/ops.h"
#include "meshloom/train/trainer.h"

namespace {

using meshloom::data::Document;

std::vector<Document> read_documents(const std::string& path) {
  std::ifstream file(path);
  std::vector<Document> documents;
  for (std::string line; std::getline(file, line);) {
    const auto tokens = nlohmann::json::parse(line).at("tokens");
    documents.push_back({.tokens = tokens.get<std::vector<std::int32_t>>(), .loss_mask = {}});
  }
  return documents;
}

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Peak resident bytes of this process.
std::int64_t peak_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return std::int64_t{usage.ru_maxrss} * 1024;
}

/// Whether rank 0 was asked for another step.
bool another(meshloom::comm::Communicator& world) {
  at::Tensor go = at::full({1}, 0, at::TensorOptions().dtype(at::kLong));
  if (world.rank() == 0) {
    std::string line;
    if (std::getline(std::cin, line)) go.fill_(1);
  }
  world.broadcast_(go, 0).wait();
  return go.item<std::int64_t>() != 0;
}

/// How the ranks share the work; by default HDP over all of them.
struct Spread {
  meshloom::Layout layout{.hdp = 0};
  int zero = 1;
  std::int64_t capacity_tokens = 0;  ///< 0: of the longest document
};

void run(const std::string& model, const std::string& documents_path, int threads,
         const Spread& spread) {
  const auto environment = meshloom::Environment::from_process();
  meshloom::model::ops::set_cpu_level(environment.cpu);
  auto world = meshloom::comm::make_world(environment);
  const std::vector<Document> documents = read_documents(documents_path);
  std::int64_t total = 0;
  std::int64_t longest = 0;
  for (const Document& document : documents) {
    const auto length = static_cast<std::int64_t>(document.tokens.size());
    total += length;
    longest = std::max(longest, length);
  }

  meshloom::train::TrainConfig config;
  config.model.path = model;
  config.steps = 1'000'000;
  config.threads = threads;
  config.global_batch_tokens = total;
  // A micro-batch is as large as the longest document; transformers' side has one document at a
  // time, or a group padded to its longest.
  config.capacity_tokens = spread.capacity_tokens > 0 ? spread.capacity_tokens : longest;
  config.layout = spread.layout;
  config.parallel.zero = spread.zero;
  config.data.max_document_tokens = longest;
  // What transformers' side does: no balance loss, no clipping, a constant rate.
  config.aux_loss_coefficient = 0.0;
  config.clip_norm = 0.0;
  config.schedule.kind = "constant";
  config.run = (std::filesystem::path(documents_path).parent_path() / "run").string();
  config.checkpoint.resume = "no";
  config.timeline_steps = 0;

  meshloom::data::LoaderOptions options;
  options.global_batch_tokens = total;
  options.max_document_tokens = longest;
  auto loader = std::make_shared<meshloom::data::Loader>(
      std::vector<meshloom::data::WeightedSource>{{meshloom::data::documents(documents), 1.0}},
      options);
  const auto model_config = meshloom::train::load_model_config(config);
  meshloom::train::Trainer trainer(config, model_config, loader, world);

  while (another(world)) {
    const auto begin = std::chrono::steady_clock::now();
    const double cpu = cpu_seconds();
    const meshloom::train::StepMetrics step = trainer.step();
    const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
    if (world.rank() != 0) continue;
    const nlohmann::json line = {{"seconds", wall.count()},
                                 {"cpu_seconds", cpu_seconds() - cpu},
                                 {"loss", step.loss},
                                 {"tokens", step.tokens}};
    std::cout << line.dump() << std::endl;
  }
  if (world.rank() == 0) {
    std::cout << nlohmann::json({{"peak_bytes", peak_bytes()}}).dump() << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 7) {
    std::fprintf(stderr,
                 "usage: %s MODEL_FOLDER DOCUMENTS.jsonl THREADS [LAYOUT ZERO CAPACITY_TOKENS]\n",
                 argv[0]);
    return 2;
  }
  try {
    Spread spread;
    if (argc == 7) {
      spread = {.layout = meshloom::Layout::parse(argv[4]),
                .zero = std::stoi(argv[5]),
                .capacity_tokens = std::stoll(argv[6])};
    }
    run(argv[1], argv[2], std::stoi(argv[3]), spread);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
