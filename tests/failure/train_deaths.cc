// One rank of a training run in which a rank dies, under mpirun --enable-recovery:
//   train_deaths kill|stop PHASE VICTIM STEP SECONDS RUN_FOLDER LAYOUT ZERO
// PHASE is load, forward, backward, reduce or step (an instruction, before it begins), the purpose
// of a call (while the step makes such calls), or checkpoint (while the step is saved).
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <thread>

#include "meshloom/comm/backends.h"
#include "meshloom/core/error.h"
#include "meshloom/train/trainer.h"
#include "unit/train/tiny_run.h"

namespace meshloom::train {
namespace {

constexpr std::int64_t kSteps = 12;
constexpr std::size_t kDocumentTokens = 128;
constexpr std::array<std::string_view, 5> kInstructions{"load", "forward", "backward", "reduce",
                                                        "step"};
/// Between looks at what the rank does; a step takes some milliseconds.
constexpr std::chrono::microseconds kLook{200};

struct Death {
  int signal = SIGKILL;
  std::string phase;
  int victim = 0;
  std::int64_t step = 0;

  [[nodiscard]] bool at_instruction() const {
    return std::find(kInstructions.begin(), kInstructions.end(), phase) != kInstructions.end();
  }
};

/// How the ranks share the work.
struct Spread {
  Layout layout;
  int zero = 1;
};

void say(int rank, const std::string& text) {
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  // One write: lines of several processes stay whole.
  const auto line = fmt::format("rank {} at {:.3f} {}\n", rank, now, text);
  if (::write(STDOUT_FILENO, line.data(), line.size()) < 0) std::perror("write");
}

void die(const Death& death) {
  say(death.victim, fmt::format("pid {} dies", ::getpid()));
  ::kill(::getpid(), death.signal);
}

/// Dies once the rank makes a call of the phase, or has made one.
void watch(const comm::Communicator& world, const Death& death, const std::atomic<bool>& ended) {
  while (!ended) {
    for (const comm::OperationRecord& record : world.recorder().records()) {
      const bool place = death.phase == "checkpoint" ? record.label.instruction == "checkpoint"
                                                     : record.purpose == death.phase;
      if (place && record.label.step == death.step) {
        die(death);
        return;
      }
    }
    std::this_thread::sleep_for(kLook);
  }
}

int run(comm::Communicator world, const Death& death, double limit, const std::string& folder,
        const Spread& spread) {
  TrainConfig config = tiny_config(folder, kSteps);
  config.layout = spread.layout;
  config.parallel.zero = spread.zero;
  if (spread.layout.hdp > 1) {
    config.capacity_tokens = static_cast<std::int64_t>(kDocumentTokens) / 2;  // no rank holds one
  }
  config.checkpoint.every_steps = 1;
  config.watchdog_seconds = limit / 2.0;
  config.timeout_seconds = limit;
  TrainerHooks hooks;
  std::int64_t steps = 0;
  bool dead = false;
  hooks.before = [&](const plan::Instruction& instruction) {
    if (world.rank() != death.victim || steps != death.step || dead) return;
    if (plan::to_string(instruction.op) != death.phase) return;
    dead = true;
    die(death);
  };
  if (spread.layout.ep > 1) config.parallel.experts = {.replan_every = 1, .least_gain = 0.0};
  // Documents that no rank holds alone, so that every step exchanges, and of few tokens each, so
  // that loads change and every step moves experts.
  std::vector<data::Document> documents(40);
  for (std::size_t d = 0; d < documents.size(); ++d) {
    for (std::size_t t = 0; t < kDocumentTokens; ++t) {
      documents[d].tokens.push_back(static_cast<std::int32_t>((17 * d + t % 3) % 64));
    }
  }
  std::atomic<bool> ended{false};
  std::thread watcher;
  int code = 0;
  try {
    Trainer trainer(config, tiny_moe(), tiny_loader(documents), world, nullptr, hooks);
    if (world.rank() == death.victim && !death.at_instruction()) {
      watcher = std::thread([&] { watch(world, death, ended); });
    }
    trainer.run([&](const StepMetrics&) { ++steps; });
    say(world.rank(), "ok");
  } catch (const Error& error) {
    say(world.rank(), fmt::format("says: {}", error.what()));
    code = 3;
  }
  ended = true;
  if (watcher.joinable()) watcher.join();
  return code;
}

}  // namespace
}  // namespace meshloom::train

int main(int argc, char** argv) {
  if (argc != 9) return 2;
  const std::string signal = argv[1];
  const meshloom::train::Death death{.signal = signal == "kill" ? SIGKILL : SIGSTOP,
                                     .phase = argv[2],
                                     .victim = std::atoi(argv[3]),
                                     .step = std::atoi(argv[4])};
  const double limit = std::atof(argv[5]);
  auto world = meshloom::comm::make_mpi_world(
      {.timeout = std::chrono::milliseconds(static_cast<int>(1000 * limit))});
  return meshloom::train::run(
      world, death, limit, argv[6],
      {.layout = meshloom::Layout::parse(argv[7]), .zero = std::atoi(argv[8])});
}
