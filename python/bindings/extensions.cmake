# The extension modules: `_plan` never loads LibTorch, `_core` is the rest.
meshloom_add_extension(_plan
  SOURCES
    bindings/plan/models.cc
    bindings/plan/module.cc
    bindings/plan/program.cc
    bindings/plan/step_plan.cc
    bindings/plan/strategy.cc
    bindings/plan/verifier.cc
  LIBRARIES meshloom::plan)
