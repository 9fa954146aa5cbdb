#include "train/internal/step_planner.h"

#include <fmt/format.h>

#include <charconv>
#include <utility>

#include "meshloom/core/error.h"
#include "train/internal/checkpoint_file.h"
#include "train/internal/setup.h"

namespace meshloom::train::detail {

namespace {

constexpr const char* kPlannerWhere = "train.planner";
/// Two numbers of 16 hexadecimal digits: the hash of the rest, and the membership's size.
constexpr std::size_t kDigits = 16;

std::uint64_t parse_hex(const std::string& text, std::size_t at) {
  std::uint64_t value = 0;
  std::from_chars(text.data() + at, text.data() + at + kDigits, value, 16);
  return value;
}

}  // namespace

std::string StepOrder::to_bytes() const {
  const std::string members = membership.to_bytes();
  const std::string body = hex64(members.size()) + members + plan.to_json();
  return hex64(xxhash64(body.data(), body.size())) + body;
}

StepOrder StepOrder::from_bytes(const std::string& bytes) {
  const bool long_enough = bytes.size() >= 2 * kDigits;
  const std::uint64_t hash =
      long_enough ? xxhash64(bytes.data() + kDigits, bytes.size() - kDigits) : 0;
  if (!long_enough || hash != parse_hex(bytes, 0)) {
    throw PlanError(kPlannerWhere, fmt::format("the step's plan arrived damaged: {} bytes, hash {}",
                                               bytes.size(), hex64(hash)));
  }
  const auto members = static_cast<std::size_t>(parse_hex(bytes, kDigits));
  return {.membership = data::StepMembership::from_bytes(bytes.substr(2 * kDigits, members)),
          .plan = plan::StepPlan::from_json(std::string_view(bytes).substr(2 * kDigits + members))};
}

StepPlanner::StepPlanner(std::shared_ptr<data::Loader> loader,
                         std::shared_ptr<plan::BalanceStrategy> strategy, std::string strategy_name,
                         plan::PlanProblem problem, plan::CompileOptions compile)
    : loader_(std::move(loader)),
      strategy_(std::move(strategy)),
      strategy_name_(std::move(strategy_name)),
      problem_(std::move(problem)),
      compile_(std::move(compile)) {}

void StepPlanner::start(std::int64_t step, const CostModel& cost, const MemoryModel& memory) {
  next_ = std::async(std::launch::async,
                     [this, step, cost, memory] { return make(step, cost, memory); });
}

StepPlanner::Result StepPlanner::take(std::chrono::milliseconds limit) {
  if (next_.wait_for(limit) != std::future_status::ready) {
    throw Timeout(kPlannerWhere, fmt::format("no plan for the next step within {} s",
                                             static_cast<double>(limit.count()) / 1000.0));
  }
  return next_.get();
}

StepPlanner::Result StepPlanner::make(std::int64_t step, const CostModel& cost,
                                      const MemoryModel& memory) {
  StepOrder order{.membership = loader_->next(), .plan = {}};
  const auto begin = std::chrono::steady_clock::now();
  plan::PlanProblem problem = problem_;
  problem.step = step;
  problem.cost = cost;
  problem.memory = memory;
  problem.samples = order.membership.samples;
  order.plan = plan::make_plan(problem, strategy_name_, *strategy_);
  verify_step(order.plan, compile_);
  Result result{.bytes = order.to_bytes(), .loader_state = loader_->state()};
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

}  // namespace meshloom::train::detail
