#include "failure/comm_deaths.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <thread>

#include "meshloom/core/error.h"

namespace meshloom::comm::deaths {
namespace {

constexpr int kGoodSteps = 3;
constexpr int kSteps = 8;
constexpr std::int64_t kElements = 40'000;  // beyond every eager limit

void say(const Communicator& comm, const std::string& text) {
  // One write: lines of several processes stay whole.
  const auto line = fmt::format("rank {} {}\n", comm.rank(), text);
  if (::write(STDOUT_FILENO, line.data(), line.size()) < 0) std::perror("write");
}

CallOptions purpose(const char* name) {
  CallOptions options;
  options.purpose = name;
  return options;
}

void label(const Communicator& comm, int step, const char* instruction) {
  Label now;
  now.step = step;
  now.instruction = instruction;
  now.slot = 1;
  now.unit = 7;
  now.samples = {4, 9};
  comm.recorder().set_label(now);
}

void reduce(Communicator& comm) {
  auto tensor = at::full({kElements}, 1.0, at::kFloat);
  comm.all_reduce_(tensor, ReduceOp::kSum, purpose("gradients")).wait();
}

void ring(Communicator& comm) {
  const int n = comm.size();
  auto out = at::full({kElements}, comm.rank(), at::kFloat);
  auto in = at::zeros({kElements}, at::kFloat);
  const Transfer to{(comm.rank() + 1) % n, &out};
  const Transfer from{(comm.rank() + n - 1) % n, &in};
  comm.send_receive({&to, 1}, {&from, 1}, purpose("exchange")).wait();
}

void end_here(const Communicator& comm, int signal, const char* word) {
  say(comm, fmt::format("pid {} {}", ::getpid(), word));
  std::raise(signal);
}

// What the victim does in step kGoodSteps in place of what the others do.
void misbehave(Communicator& comm, const std::string& mode) {
  if (mode.starts_with("killed")) end_here(comm, SIGKILL, "ends");
  if (mode == "stopped") end_here(comm, SIGSTOP, "stops");
  if (mode == "absent") {
    say(comm, fmt::format("pid {} waits", ::getpid()));
    // Until the others have given up; the group is gone then.
    std::this_thread::sleep_for(std::chrono::seconds(5));
    reduce(comm);
  }
  auto tensor = at::zeros({kElements + 1}, at::kFloat);
  if (mode == "shapes") comm.all_reduce_(tensor, ReduceOp::kSum, purpose("gradients")).wait();
  if (mode == "kinds") comm.broadcast_(tensor, 0, purpose("parameters")).wait();
}

}  // namespace

int run(Communicator& comm, const std::string& mode) {
  const bool victim = comm.rank() == comm.size() - 2;
  auto start = std::chrono::steady_clock::now();
  try {
    for (int step = 0; step < kSteps; ++step) {
      start = std::chrono::steady_clock::now();
      const bool breaks = victim && step == kGoodSteps;
      if (mode == "killed_in_split") {
        label(comm, step, "split");
        if (breaks) misbehave(comm, mode);
        auto half = comm.split(comm.rank() % 2, 0, "half");
        reduce(*half);
      } else if (mode == "killed_in_exchange") {
        label(comm, step, "forward");
        if (breaks) misbehave(comm, mode);
        ring(comm);
      } else {
        label(comm, step, "reduce");
        if (breaks) {
          misbehave(comm, mode);
        } else {
          reduce(comm);
        }
      }
    }
  } catch (const Error& error) {
    const auto seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    say(comm, fmt::format("after {:.1f} s: {}", seconds, error.what()));
    return 3;
  }
  say(comm, fmt::format("pid {} ok", ::getpid()));
  return 0;
}

}  // namespace meshloom::comm::deaths
