# Finds LibTorch in the torch package of a Python interpreter, without torch's own CMake config
# (which stops on machines without a CUDA toolkit and changes CUDA settings behind our back).
#
#   LibTorch_ROOT        folder of the torch package; otherwise the interpreter is asked
#   LibTorch_FOUND, LibTorch_VERSION, LibTorch_ROOT_DIR, LibTorch_HAS_CUDA
#   LibTorch::c10, LibTorch::torch_cpu, and where present LibTorch::c10_cuda, LibTorch::torch_cuda,
#   LibTorch::torch_python
if(NOT DEFINED LibTorch_ROOT_DIR)
  if(LibTorch_ROOT)
    set(_root "${LibTorch_ROOT}")
  else()
    if(NOT Python_EXECUTABLE)
      find_package(Python COMPONENTS Interpreter QUIET)
    endif()
    if(Python_EXECUTABLE)
      # find_spec does not import torch: half a gigabyte and a second saved.
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
        OUTPUT_VARIABLE _root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
  endif()
  set(LibTorch_ROOT_DIR "${_root}" CACHE PATH "Folder of the torch package" FORCE)
endif()

set(LibTorch_VERSION "")
if(LibTorch_ROOT_DIR AND EXISTS "${LibTorch_ROOT_DIR}/version.py")
  file(STRINGS "${LibTorch_ROOT_DIR}/version.py" _line REGEX "^__version__")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" LibTorch_VERSION "${_line}")
endif()
find_library(LibTorch_torch_cpu_LIBRARY torch_cpu PATHS "${LibTorch_ROOT_DIR}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_c10_LIBRARY c10 PATHS "${LibTorch_ROOT_DIR}/lib" NO_DEFAULT_PATH)

if(NOT LibTorch_torch_cpu_LIBRARY)
  set(LibTorch_NOT_FOUND_MESSAGE
    "no torch package in ${Python_EXECUTABLE}; set -DPython_EXECUTABLE or -DLibTorch_ROOT")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_torch_cpu_LIBRARY LibTorch_c10_LIBRARY
  VERSION_VAR LibTorch_VERSION)

if(LibTorch_FOUND AND NOT TARGET LibTorch::c10)
  set(_includes "${LibTorch_ROOT_DIR}/include"
    "${LibTorch_ROOT_DIR}/include/torch/csrc/api/include")
  foreach(_name c10 torch_cpu c10_cuda torch_cuda torch_python)
    find_library(LibTorch_${_name}_LIBRARY ${_name}
      PATHS "${LibTorch_ROOT_DIR}/lib" NO_DEFAULT_PATH)
    mark_as_advanced(LibTorch_${_name}_LIBRARY)
    if(LibTorch_${_name}_LIBRARY)
      add_library(LibTorch::${_name} SHARED IMPORTED GLOBAL)
      set_target_properties(LibTorch::${_name} PROPERTIES
        IMPORTED_LOCATION "${LibTorch_${_name}_LIBRARY}"
        INTERFACE_INCLUDE_DIRECTORIES "${_includes}"
        INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${_includes}")
    endif()
  endforeach()
  set_property(TARGET LibTorch::torch_cpu PROPERTY INTERFACE_LINK_LIBRARIES LibTorch::c10)
  # The libraries of a CUDA wheel sit in sibling packages; torch's own run path finds them at run
  # time, the linker has to be told not to look.
  set_property(TARGET LibTorch::torch_cpu PROPERTY INTERFACE_LINK_OPTIONS
    "LINKER:--allow-shlib-undefined" "LINKER:-rpath-link,${LibTorch_ROOT_DIR}/lib"
    # Ubuntu links --as-needed: a program would drop LibTorch, and with it the path to it that
    # libmeshloom relies on.
    "LINKER:--no-as-needed")
  if(TARGET LibTorch::torch_cuda)
    set(LibTorch_HAS_CUDA ON)
    set_property(TARGET LibTorch::torch_cuda PROPERTY
      INTERFACE_LINK_LIBRARIES LibTorch::c10_cuda LibTorch::torch_cpu)
  endif()
endif()
