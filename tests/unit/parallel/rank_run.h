#pragma once

// One rank of a layout with a small model on it, ready to run steps.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

#include "meshloom/comm/communicator.h"
#include "meshloom/model/parameters.h"
#include "meshloom/parallel/executor.h"
#include "meshloom/parallel/groups.h"
#include "meshloom/parallel/model_placement.h"
#include "meshloom/parallel/model_state.h"

namespace meshloom::parallel {

struct RankRun {
  static constexpr std::uint64_t kSeed = 3;  ///< of the initial values

  RankRun(const comm::Communicator& world, ModelPlacement placed, at::ScalarType dtype,
          ExecutorOptions options = {})
      : placement(std::move(placed)),
        groups(world, placement),
        state(placement, groups, dtype, at::kCPU),
        executor(build_stages(placement, groups.at()), placement, groups, std::move(options)) {
    state.assign([&](const model::ParameterTable& table, at::Tensor& values) {
      model::initialize_(values, table, placement.config.initializer_range, kSeed);
    });
  }

  ModelPlacement placement;
  Groups groups;
  ModelState state;
  Executor executor;
};

}  // namespace meshloom::parallel
