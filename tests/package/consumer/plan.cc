#include <cstdio>

#include "meshloom/core/version.h"
#include "meshloom/plan/strategy.h"
#include "meshloom/plan/verifier.h"

int main() {
  meshloom::plan::PlanProblem problem;
  problem.layout.hdp = 4;
  problem.capacity_tokens = 1000;
  problem.samples = {{0, 3000, 2999}, {1, 500, 499}, {2, 700, 699}};
  const auto plan = meshloom::plan::make_plan(problem, "naive_hdp");
  meshloom::plan::verify(plan);
  std::printf("meshloom %s: %zu slots\n", meshloom::kVersion, plan.slots.size());
}
