# The extension modules: `_plan` never loads LibTorch, `_core` is the rest.
meshloom_add_extension(_plan
  SOURCES
    bindings/plan/fit.cc
    bindings/plan/memory.cc
    bindings/plan/models.cc
    bindings/plan/module.cc
    bindings/plan/program.cc
    bindings/plan/schedule.cc
    bindings/plan/simulator.cc
    bindings/plan/step_plan.cc
    bindings/plan/strategy.cc
    bindings/plan/verifier.cc
  LIBRARIES meshloom::plan)

if(MESHLOOM_HAS_TORCH)
  meshloom_add_extension(_core
    SOURCES
      bindings/core/comm.cc
      bindings/core/data.cc
      bindings/core/model.cc
      bindings/core/module.cc
      bindings/core/parallel.cc
      bindings/core/train.cc
    LIBRARIES meshloom::meshloom LibTorch::torch_python LibTorch::torch_cpu)
  target_compile_definitions(_core PRIVATE AT_PER_OPERATOR_HEADERS)
endif()
