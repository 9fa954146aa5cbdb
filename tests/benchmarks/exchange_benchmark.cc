// Exchanges on a network of limited rate: whether the choice by the cost model is the fastest, and
// how much of a ring's transfer is hidden. Figures are in docs/measurements.md.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "benchmarks/plan_lengths.h"
#include "limited_world.h"
#include "meshloom/comm/backends.h"
#include "meshloom/core/random.h"
#include "meshloom/model/attention_exchange.h"
#include "meshloom/parallel/exchange.h"
#include "meshloom/parallel/sample_batch.h"
#include "meshloom/plan/exchange_choice.h"
#include "meshloom/plan/strategy.h"

namespace meshloom::benchmarks {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kHeadDim = 64;

/// One unit and its model; fp32.
struct Setting {
  int degree = 2;
  std::vector<std::int64_t> lengths;
  std::int64_t heads = 8;
  std::int64_t kv_heads = 2;
  std::int64_t window = 0;
  LinkLimit limit;
};

at::Tensor random_tensor(std::vector<std::int64_t> shape, std::uint64_t seed) {
  auto tensor = at::empty(shape, at::TensorOptions().dtype(at::kFloat));
  auto* data = tensor.mutable_data_ptr<float>();
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    data[i] = static_cast<float>(random_uniform(seed, static_cast<std::uint64_t>(i)) - 0.5);
  }
  return tensor;
}

plan::StepPlan plan_of(const Setting& setting) {
  plan::StepPlan plan;
  plan::Unit unit;
  for (int rank = 0; rank < setting.degree; ++rank) unit.ranks.push_back(rank);
  for (std::size_t i = 0; i < setting.lengths.size(); ++i) {
    const auto id = static_cast<std::int64_t>(i);
    plan.samples.push_back(
        {.id = id, .tokens = setting.lengths[i], .loss_tokens = setting.lengths[i] - 1});
    unit.samples.push_back(id);
  }
  plan.slots = {{.units = {unit}}};
  return plan;
}

struct Timing {
  double seconds = 0.0;  ///< of the slowest rank, forward and backward; best round
  double waited = 0.0;   ///< for transfers, sum over calls of one rank; mean over ranks
  double calls = 0.0;    ///< of one rank
};

/// Forward and backward of one layer on thread ranks, `rounds` times after a warm-up.
Timing measure(const Setting& setting, plan::Exchange exchange, int group, int rounds) {
  auto world = make_limited_world(setting.degree, setting.limit);
  auto plan = plan_of(setting);
  plan.slots[0].units[0].exchange = exchange;
  plan.slots[0].units[0].ulysses_degree = group;
  std::barrier<> line(setting.degree);
  std::mutex mutex;
  std::vector<double> slowest(static_cast<std::size_t>(rounds), 0.0);
  Timing timing;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < setting.degree; ++rank) {
    threads.emplace_back([&, rank] {
      at::set_num_threads(1);
      const plan::Unit& unit = plan.slots[0].units[0];
      const parallel::SampleLoader load = [&](std::int64_t id) {
        return parallel::SampleTokens{
            std::vector<std::int32_t>(
                static_cast<std::size_t>(setting.lengths[static_cast<std::size_t>(id)]), 0),
            {}};
      };
      const auto batch = parallel::build_batch(plan, unit, rank, load, at::kCPU);
      const auto rows = batch.size();
      const auto q = random_tensor({rows, setting.heads, kHeadDim}, 1);
      const auto k = random_tensor({rows, setting.kv_heads, kHeadDim}, 2);
      const auto v = random_tensor({rows, setting.kv_heads, kHeadDim}, 3);
      const auto dout = random_tensor({rows, setting.heads, kHeadDim}, 4);
      const model::AttentionOptions options{.scale = 0.125, .window = setting.window};
      double waited = 0.0;
      int calls = 0;
      const auto attention = parallel::make_exchange(
          world[static_cast<std::size_t>(rank)], unit,
          [&](parallel::Span::Kind kind, Clock::time_point begin, Clock::time_point end) {
            if (kind != parallel::Span::Kind::kWait) return;
            waited += std::chrono::duration<double>(end - begin).count();
            ++calls;
          });
      for (int round = -1; round < rounds; ++round) {
        if (round == 0) {
          waited = 0.0;
          calls = 0;
        }
        line.arrive_and_wait();
        const auto begin = Clock::now();
        const auto out = attention->forward(q, k, v, batch, options);
        (void)attention->backward(dout, q, k, v, out, batch, options);
        const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        if (round < 0) continue;
        const std::lock_guard lock(mutex);
        auto& slot = slowest[static_cast<std::size_t>(round)];
        slot = std::max(slot, seconds);
      }
      const std::lock_guard lock(mutex);
      timing.waited += waited / rounds / setting.degree;
      timing.calls += static_cast<double>(calls) / rounds / setting.degree;
    });
  }
  for (auto& thread : threads) thread.join();
  timing.seconds = *std::min_element(slowest.begin(), slowest.end());
  return timing;
}

/// Seconds of one query-key pair in the kernel when `degree` ranks compute at once.
std::pair<double, double> pair_seconds(const Setting& setting) {
  static constexpr std::int64_t kTokens = 768;
  constexpr int kRounds = 5;
  std::vector<double> forward;
  std::vector<double> backward;
  std::mutex mutex;
  std::barrier<> line(setting.degree);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < setting.degree; ++rank) {
    threads.emplace_back([&] {
      at::set_num_threads(1);
      Setting alone = setting;
      alone.degree = 1;
      alone.lengths = {kTokens};
      const auto plan = plan_of(alone);
      const auto batch = parallel::build_batch(
          plan, plan.slots[0].units[0], 0,
          [](std::int64_t) {
            return parallel::SampleTokens{std::vector<std::int32_t>(kTokens, 0), {}};
          },
          at::kCPU);
      const auto q = random_tensor({kTokens, setting.heads, kHeadDim}, 1);
      const auto k = random_tensor({kTokens, setting.kv_heads, kHeadDim}, 2);
      const auto v = random_tensor({kTokens, setting.kv_heads, kHeadDim}, 3);
      model::LocalAttention local;
      const model::AttentionOptions options{.scale = 0.125, .window = 0};
      for (int round = 0; round < kRounds; ++round) {
        line.arrive_and_wait();
        const auto begin = Clock::now();
        const auto out = local.forward(q, k, v, batch, options);
        const auto middle = Clock::now();
        (void)local.backward(q, q, k, v, out, batch, options);
        const auto end = Clock::now();
        const std::lock_guard lock(mutex);
        forward.push_back(std::chrono::duration<double>(middle - begin).count());
        backward.push_back(std::chrono::duration<double>(end - middle).count());
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const double pairs = 0.5 * kTokens * (kTokens + 1);
  const auto best = [](const std::vector<double>& all) {
    return *std::min_element(all.begin(), all.end());
  };
  return {best(forward) / pairs, best(backward) / pairs};
}

plan::ExchangeModel model_of(const Setting& setting, std::pair<double, double> pair) {
  plan::ExchangeModel model;
  model.shape = {.heads = setting.heads,
                 .key_value_heads = setting.kv_heads,
                 .head_dim = kHeadDim,
                 .window = setting.window,
                 .element_bytes = 4,
                 .wire_bytes = 4,
                 .statistic_bytes = 4};
  model.forward_pair_seconds = pair.first;
  model.backward_pair_seconds = pair.second;
  model.inside = {.bandwidth = setting.limit.bandwidth, .latency = setting.limit.latency};
  model.between = model.inside;
  return model;
}

Setting random_setting(std::uint64_t seed) {
  std::uint64_t draw = 0;
  const std::uint64_t key = random_key("exchange unit", seed);
  const auto uniform = [&] { return random_uniform(key, draw++); };
  const auto pick = [&](const auto& values) {
    return values[static_cast<std::size_t>(uniform() * static_cast<double>(std::size(values)))];
  };
  Setting setting;
  constexpr int kDegrees[] = {2, 3, 4, 6, 8};
  constexpr std::pair<int, int> kHeads[] = {{8, 8}, {8, 2}, {8, 1}, {4, 4}, {6, 2}};
  setting.degree = pick(kDegrees);
  std::tie(setting.heads, setting.kv_heads) = pick(kHeads);
  const double tokens = 128.0 * std::pow(2.0, 3.0 * uniform());
  const int documents = 1 + static_cast<int>(3.0 * uniform());
  for (int d = 0; d < documents; ++d) {
    setting.lengths.push_back(static_cast<std::int64_t>(tokens / documents * (0.5 + uniform())));
  }
  if (uniform() < 0.2) setting.window = 64;
  setting.limit = {.bandwidth = 8e6 * std::pow(20.0, uniform()),
                   .latency = 0.5e-3 * std::pow(10.0, uniform())};
  return setting;
}

std::string name_of(plan::Exchange exchange, int group) {
  std::string name(plan::to_string(exchange));
  return group > 0 ? name + "/" + std::to_string(group) : name;
}

void choice(int units, int rounds) {
  // Timings of a shared machine: times this close are the same.
  constexpr double kSame = 0.03;
  constexpr int kTurns = 2;
  int fastest = 0;
  int close = 0;
  double lost = 0.0;
  std::map<std::string, int> chosen;
  fmt::print("| ranks | tokens | heads | MB/s | ms | chosen | measured, ms (predicted) |\n");
  for (int u = 0; u < units; ++u) {
    const Setting setting = random_setting(static_cast<std::uint64_t>(u));
    const plan::ExchangeChooser chooser(model_of(setting, pair_seconds(setting)), {});
    std::vector<int> ranks(static_cast<std::size_t>(setting.degree));
    std::iota(ranks.begin(), ranks.end(), 0);
    const auto choice = chooser.choose(setting.lengths, ranks);
    // Turns, so that what else the machine does hits all alike.
    std::vector<double> measured(choice.candidates.size(), 1e30);
    for (int turn = 0; turn < kTurns; ++turn) {
      for (std::size_t i = 0; i < measured.size(); ++i) {
        const auto& candidate = choice.candidates[i];
        measured[i] = std::min(
            measured[i], measure(setting, candidate.exchange, candidate.group, rounds).seconds);
      }
    }
    double best = 1e30;
    double own = 0.0;
    std::string all;
    for (std::size_t i = 0; i < measured.size(); ++i) {
      const auto& candidate = choice.candidates[i];
      best = std::min(best, measured[i]);
      if (candidate.exchange == choice.chosen.exchange && candidate.group == choice.chosen.group) {
        own = measured[i];
      }
      all += fmt::format(" {} {:.1f} ({:.1f})", name_of(candidate.exchange, candidate.group),
                         1e3 * measured[i], 1e3 * candidate.seconds);
    }
    fastest += own <= best;
    close += own <= best * (1.0 + kSame);
    lost += own / best - 1.0;
    ++chosen[name_of(choice.chosen.exchange, 0)];
    fmt::print("| {} | {} | {}/{}{} | {:.0f} | {:.1f} | {}{} |{} |\n", setting.degree,
               std::accumulate(setting.lengths.begin(), setting.lengths.end(), std::int64_t{0}),
               setting.heads, setting.kv_heads, setting.window > 0 ? " w" : "",
               1e-6 * setting.limit.bandwidth, 1e3 * setting.limit.latency,
               name_of(choice.chosen.exchange, choice.chosen.group),
               own <= best * (1.0 + kSame) ? "" : " (slower)", all);
    std::fflush(stdout);
  }
  fmt::print("chosen: ");
  for (const auto& [name, count] : chosen) fmt::print("{} {}  ", name, count);
  fmt::print("\nfastest {} of {}, within {:.0f} % {} of {}, lost on average {:.2f} %\n", fastest,
             units, 100 * kSame, close, units, 100.0 * lost / units);
}

void overlap(int rounds) {
  fmt::print("| ranks | tokens | on the link, ms | waited, ms | hidden |\n");
  for (const auto& [degree, tokens] : std::vector<std::pair<int, std::int64_t>>{
           {2, 2048}, {2, 4096}, {4, 4096}, {4, 8192}, {8, 8192}}) {
    Setting setting{
        .degree = degree, .lengths = {tokens}, .heads = 8, .kv_heads = 2, .window = 0, .limit = {}};
    // A link on which a block takes half of the computation beside it in forward.
    const auto pair = pair_seconds(setting);
    const double block = 0.5 * static_cast<double>(tokens * tokens) / degree / degree * pair.first;
    const double block_bytes = static_cast<double>(tokens) / degree * 2 * 2 * kHeadDim * 4;
    setting.limit = {.bandwidth = block_bytes / (0.5 * block), .latency = 0.1e-3};
    const auto timing = measure(setting, plan::Exchange::kRing, 0, rounds);
    const auto bytes = plan::exchange_bytes(setting.lengths, degree, plan::Exchange::kRing, 0,
                                            model_of(setting, pair).shape);
    // The mean rank's; the one that attends to most is a third above.
    const double link =
        static_cast<double>(bytes.forward + bytes.backward) / degree / setting.limit.bandwidth +
        timing.calls * setting.limit.latency;
    fmt::print("| {} | {} | {:.1f} | {:.1f} | {:.1f} % |\n", degree, tokens, 1e3 * link,
               1e3 * timing.waited, 100.0 * (1.0 - timing.waited / link));
    std::fflush(stdout);
  }
}

/// What bf16 keys and values between ranks do to fp32 attention with normal inputs.
void wire() {
  static constexpr std::int64_t kTokens = 4096;
  Setting setting{
      .degree = 4, .lengths = {kTokens}, .heads = 8, .kv_heads = 2, .window = 0, .limit = {}};
  setting.limit = {.bandwidth = 1e12, .latency = 0.0};
  auto plan = plan_of(setting);
  std::map<std::string, double> most;
  std::map<std::string, double> squares;
  std::mutex mutex;
  comm::run_thread_ranks(setting.degree, [&](comm::Communicator hdp) {
    const plan::Unit unit = [&] {
      plan::Unit ring = plan.slots[0].units[0];
      ring.exchange = plan::Exchange::kRing;
      return ring;
    }();
    const auto batch = parallel::build_batch(
        plan, unit, hdp.rank(),
        [](std::int64_t) {
          return parallel::SampleTokens{std::vector<std::int32_t>(kTokens, 0), {}};
        },
        at::kCPU);
    const auto normal = [&](std::int64_t heads, std::uint64_t seed) {
      auto tensor =
          at::empty({batch.size(), heads, kHeadDim}, at::TensorOptions().dtype(at::kFloat));
      auto* data = tensor.mutable_data_ptr<float>();
      const auto key = random_key("wire", seed + 10 * static_cast<std::uint64_t>(hdp.rank()));
      for (std::int64_t i = 0; i < tensor.numel(); ++i) {
        data[i] = static_cast<float>(random_normal(key, static_cast<std::uint64_t>(i)));
      }
      return tensor;
    };
    const auto q = normal(setting.heads, 1);
    const auto k = normal(setting.kv_heads, 2);
    const auto v = normal(setting.kv_heads, 3);
    const auto dout = normal(setting.heads, 4);
    const auto results = [&](std::optional<at::ScalarType> type) {
      const auto attention =
          parallel::make_exchange_factory({.wire_type = type})(hdp, unit, {}, nullptr);
      const model::AttentionOptions options{.scale = 0.125, .window = 0};
      const auto out = attention->forward(q, k, v, batch, options);
      const auto gradients = attention->backward(dout, q, k, v, out, batch, options);
      return std::map<std::string, at::Tensor>{
          {"out", out.out}, {"dq", gradients.dq}, {"dk", gradients.dk}, {"dv", gradients.dv}};
    };
    const auto exact = results(std::nullopt);
    for (const auto& [name, rounded] : results(at::kBFloat16)) {
      const at::Tensor& whole = exact.at(name);
      const at::Tensor error = rounded.sub(whole);
      const double worst = error.abs().max().item<double>() / whole.abs().max().item<double>();
      const double relative = error.norm().item<double>() / whole.norm().item<double>();
      const std::lock_guard lock(mutex);
      most[name] = std::max(most[name], worst);
      squares[name] = std::max(squares[name], relative);
    }
  });
  fmt::print("| | largest error / largest element | norm of the error / norm |\n");
  for (const auto& [name, value] : most) {
    fmt::print("| {} | {:.1e} | {:.1e} |\n", name, value, squares[name]);
  }
}

/// Bytes of plans of a production mix, against those of fixed context parallelism.
void traffic() {
  const plan::ExchangeShape shape{.heads = 32,
                                  .key_value_heads = 8,
                                  .head_dim = 128,
                                  .window = 0,
                                  .element_bytes = 2,
                                  .wire_bytes = 2,
                                  .statistic_bytes = 4};
  fmt::print(
      "| draw | static, GB a layer | whole blocks around its rings | balanced | of static |\n");
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    const auto problem =
        plan::PlanProblem::from_lengths(production_mix(8 << 20, seed), {.hdp = 64}, 32768);
    const auto bytes = [&](const plan::StepPlan& plan) {
      const auto sum = plan::exchange_bytes(plan, shape);
      return 1e-9 * static_cast<double>(sum.forward + sum.backward);
    };
    const auto fixed = plan::make_plan(problem, "static");
    const double planned = bytes(plan::make_plan(problem, "balanced"));
    // D - 1 hops of keys twice, D of gradients.
    double whole = 0.0;
    for (const auto& slot : fixed.slots) {
      for (const auto& unit : slot.units) {
        double tokens = 0.0;
        for (const auto id : unit.samples) {
          tokens += static_cast<double>(problem.samples[static_cast<std::size_t>(id)].tokens);
        }
        const auto degree = static_cast<double>(unit.ranks.size());
        if (degree > 1) whole += tokens * 2 * 8 * 128 * (2 * 2 * (degree - 1) + 4 * degree);
      }
    }
    fmt::print("| {} | {:.1f} | {:.1f} | {:.2f} | {:.3f} |\n", seed, bytes(fixed), 1e-9 * whole,
               planned, planned / bytes(fixed));
  }
}

}  // namespace
}  // namespace meshloom::benchmarks

int main(int argc, char** argv) {
  const std::string section = argc > 1 ? argv[1] : "choice";
  const int units = argc > 2 ? std::atoi(argv[2]) : 50;
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 2;
  if (section == "choice") {
    meshloom::benchmarks::choice(units, rounds);
  } else if (section == "overlap") {
    meshloom::benchmarks::overlap(rounds);
  } else if (section == "wire") {
    meshloom::benchmarks::wire();
  } else if (section == "traffic") {
    meshloom::benchmarks::traffic();
  } else {
    fmt::print(stderr,
               "usage: exchange_benchmark [choice [UNITS [ROUNDS]] | overlap | wire | traffic]\n");
    return 2;
  }
  return 0;
}
