#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "meshloom/plan/verifier.h"
#include "plan/internal/program_graph.h"

namespace meshloom::plan {
namespace {

/// Rounding of offload's arithmetic, and the tokens by which members of a unit differ.
constexpr double kTolerance = 1e-9;

/// Tokens whose activations each member of a unit keeps on its device, of all layers.
double kept(const StepPlan& plan, const std::unordered_map<std::int64_t, std::int64_t>& tokens_of,
            const Unit& unit) {
  double tokens = 0.0;
  for (const std::int64_t id : unit.samples) {
    const auto found = tokens_of.find(id);
    if (found != tokens_of.end()) tokens += static_cast<double>(found->second);
  }
  const int layers = plan.memory.layers;
  const int resident = plan.memory.resident_layers;
  const double part = layers > resident ? (resident + (1.0 - unit.offload) * (layers - resident)) /
                                              static_cast<double>(layers)
                                        : 1.0;
  return tokens * part / static_cast<double>(unit.ranks.size());
}

}  // namespace

std::vector<Violation> check_memory(const StepPlan& plan, const std::vector<Program>& programs,
                                    double most_tokens) {
  std::unordered_map<std::int64_t, std::int64_t> tokens_of;
  for (const SampleInfo& sample : plan.samples) tokens_of[sample.id] = sample.tokens;
  std::vector<std::vector<double>> of_unit(plan.slots.size());
  for (std::size_t s = 0; s < plan.slots.size(); ++s) {
    for (const Unit& unit : plan.slots[s].units) {
      of_unit[s].push_back(kept(plan, tokens_of, unit));
    }
  }
  const double pieces = static_cast<double>(plan.layout.pp) * plan.layout.chunks;
  std::vector<Violation> violations;
  for (const Program& program : programs) {
    double now = 0.0;
    bool told = false;
    std::set<std::pair<int, int>> saved;  // slot, chunk
    for (std::size_t i = 0; i < program.instructions.size(); ++i) {
      const Instruction& at = program.instructions[i];
      if (at.slot < 0 || at.unit < 0) continue;
      const double part =
          of_unit.at(static_cast<std::size_t>(at.slot)).at(static_cast<std::size_t>(at.unit)) /
          pieces;
      const auto report = [&](const char* what) {
        violations.push_back(
            {"memory", fmt::format("{}: {}", detail::describe(plan, program, i), what)});
      };
      if (at.op == Op::kForward) {
        if (!saved.emplace(at.slot, at.chunk).second) report("saves activations a second time");
        now += part;
        if (now > most_tokens * (1.0 + kTolerance) && !told) {
          told = true;  // once a rank
          violations.push_back(
              {"memory", fmt::format("{}: activations of {:.6g} tokens of all layers are kept, at "
                                     "most {:.6g} may be",
                                     detail::describe(plan, program, i), now, most_tokens)});
        }
      } else if ((at.op == Op::kBackward && !at.defer_weight_gradient) ||
                 at.op == Op::kWeightGradient) {
        if (saved.erase({at.slot, at.chunk}) == 0) {
          report("needs activations that were not saved");
        } else {
          now -= part;
        }
      }
    }
    for (const auto& [slot, chunk] : saved) {
      violations.push_back(
          {"memory", fmt::format("rank {}: activations of slot {}, chunk {} are never freed",
                                 program.rank, slot, chunk)});
    }
  }
  return violations;
}

}  // namespace meshloom::plan
