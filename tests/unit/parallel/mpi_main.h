#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <chrono>
#include <optional>

#include "meshloom/comm/backends.h"

namespace meshloom::parallel {

/// `main` of tests under mpirun: every rank runs every test in the same order, rank 0 prints, and
/// one failed rank fails the program on all.
/// @param world  there while tests run
inline int run_mpi_tests(int argc, char** argv, std::optional<comm::Communicator>& world) {
  ::testing::InitGoogleTest(&argc, argv);
  world.emplace(comm::make_mpi_world({.timeout = std::chrono::seconds(60)}));
  if (world->rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
  }
  at::Tensor result = at::full({1}, RUN_ALL_TESTS() == 0 ? 0 : 1, at::kInt);
  world->all_reduce_(result, comm::ReduceOp::kMax).wait();
  const int code = result[0].item<int>();
  world.reset();
  return code;
}

}  // namespace meshloom::parallel
