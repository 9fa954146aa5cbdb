#include "parallel/internal/place_in_plan.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstddef>

namespace meshloom::parallel::detail {

std::string describe(const plan::StepPlan& plan, const plan::Instruction& instruction) {
  auto text = fmt::format("step {}, {}", plan.step, plan::to_string(instruction.op));
  if (instruction.slot < 0) return text;
  text += fmt::format(", slot {}", instruction.slot);
  if (instruction.unit < 0) return text + ", idle";
  const auto& unit = plan.slots[static_cast<std::size_t>(instruction.slot)]
                         .units[static_cast<std::size_t>(instruction.unit)];
  constexpr std::size_t kShown = 8;
  const auto shown = std::min(unit.samples.size(), kShown);
  text += fmt::format(", unit {} (ranks {}; samples {}{})", instruction.unit,
                      fmt::join(unit.ranks, ","),
                      fmt::join(unit.samples.begin(), unit.samples.begin() + shown, ","),
                      shown < unit.samples.size() ? ",..." : "");
  return text;
}

comm::Label label_of(const plan::StepPlan& plan, const plan::Instruction& instruction) {
  comm::Label label;
  label.step = plan.step;
  label.instruction = plan::to_string(instruction.op);
  label.slot = instruction.slot;
  label.unit = instruction.unit;
  if (instruction.slot >= 0 && instruction.unit >= 0) {
    label.samples = plan.slots[static_cast<std::size_t>(instruction.slot)]
                        .units[static_cast<std::size_t>(instruction.unit)]
                        .samples;
  }
  return label;
}

std::vector<const plan::Instruction*> last_gradients(const plan::Program& program, int chunks) {
  std::vector<const plan::Instruction*> result(static_cast<std::size_t>(chunks), nullptr);
  for (const plan::Instruction& instruction : program.instructions) {
    const bool leaves =
        instruction.op == plan::Op::kWeightGradient ||
        (instruction.op == plan::Op::kBackward && !instruction.defer_weight_gradient);
    if (leaves) result.at(static_cast<std::size_t>(instruction.chunk)) = &instruction;
  }
  return result;
}

const plan::Instruction* backward_after(const plan::Program& program,
                                        const plan::Instruction& instruction) {
  const auto* const end = program.instructions.data() + program.instructions.size();
  const auto* const next = std::find_if(&instruction + 1, end, [](const auto& later) {
    return later.op == plan::Op::kForward || later.op == plan::Op::kBackward;
  });
  return next == end || next->op == plan::Op::kForward ? nullptr : next;
}

}  // namespace meshloom::parallel::detail
