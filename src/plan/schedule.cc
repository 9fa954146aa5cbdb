#include "meshloom/plan/schedule.h"

#include <fmt/format.h>

#include "meshloom/core/error.h"

namespace meshloom::plan {

Schedule make_schedule(const std::string& name, const Layout& layout, int slots) {
  if (layout.pp > 1) {
    throw NotSupported("plan.schedule", fmt::format("pipeline schedule \"{}\" (layout {})", name,
                                                    layout.to_string()));
  }
  Schedule schedule;
  schedule.stages.resize(1);
  auto& order = schedule.stages.front();
  for (int chunk = 0; chunk < layout.chunks; ++chunk) schedule.placement.push_back({0, chunk});
  for (int slot = 0; slot < slots; ++slot) {
    for (int chunk = 0; chunk < layout.chunks; ++chunk) {
      order.push_back({.op = Op::kForward, .chunk = chunk, .slot = slot});
    }
    for (int chunk = layout.chunks - 1; chunk >= 0; --chunk) {
      order.push_back({.op = Op::kBackward, .chunk = chunk, .slot = slot});
    }
  }
  return schedule;
}

}  // namespace meshloom::plan
