// Trains what a config file describes, without Python.
//
//   mpirun -n 4 build/cmake/examples/train_text examples/01_train_text/config.yaml
//
// Without a launcher it is a world of one rank.
#include <cstdio>
#include <exception>

#include "meshloom/comm/backends.h"
#include "meshloom/core/environment.h"
#include "meshloom/train/open_data.h"
#include "meshloom/train/trainer.h"

namespace {

void train(int argc, char** argv) {
  auto config = meshloom::train::TrainConfig::load(argv[1]);
  if (argc > 2) config.data.paths.assign(argv + 2, argv + argc);

  auto world = meshloom::comm::make_world(meshloom::Environment::from_process());
  const auto model = meshloom::train::load_model_config(config);
  const auto data = meshloom::train::open_data(config, model.vocab_size, world);
  meshloom::train::Trainer trainer(config, model, data, world);
  trainer.run([&](const meshloom::train::StepMetrics& step) {
    if (world.rank() != 0) return;
    std::printf("step %lld: loss %.4f, %.0f tokens/s, balance %.3f\n",
                static_cast<long long>(step.step), step.loss, step.tokens_per_second,
                step.balance_efficiency);
    std::fflush(stdout);
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CONFIG.yaml [DATA...]\n", argv[0]);
    return 2;
  }
  try {
    train(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
