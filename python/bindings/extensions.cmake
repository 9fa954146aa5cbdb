# The extension modules: `_plan` never loads LibTorch, `_core` is the rest.
meshloom_add_extension(_plan
  SOURCES
    bindings/plan/module.cc
  LIBRARIES meshloom::plan)
