# Every module is an object library; the two shared libraries collect them.
set(MESHLOOM_INCLUDE_DIR "${PROJECT_SOURCE_DIR}/include")
set(MESHLOOM_GENERATED_DIR "${PROJECT_BINARY_DIR}/generated")

function(meshloom_compile_flags target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion
      -Wno-missing-field-initializers -Wno-restrict -Wno-subobject-linkage -g1>)
  if(MESHLOOM_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
endfunction()

# meshloom_add_module(<name> [TORCH] SOURCES ... HEADERS ... [LIBRARIES ...])
# TORCH modules may include ATen, one operator header at a time. HEADERS are the public ones, named
# relative to include/meshloom/<name>.
function(meshloom_add_module name)
  cmake_parse_arguments(arg "TORCH" "" "SOURCES;HEADERS;LIBRARIES" ${ARGN})
  set(target meshloom_${name}_objects)
  list(TRANSFORM arg_HEADERS PREPEND "${MESHLOOM_INCLUDE_DIR}/meshloom/${name}/")
  add_library(${target} OBJECT ${arg_SOURCES})
  meshloom_compile_flags(${target})
  target_include_directories(${target} PRIVATE
    "${MESHLOOM_INCLUDE_DIR}" "${MESHLOOM_GENERATED_DIR}" "${PROJECT_SOURCE_DIR}/src")
  target_link_libraries(${target} PRIVATE nlohmann_json::nlohmann_json Threads::Threads
    ${arg_LIBRARIES})
  if(arg_TORCH)
    # torch bundles its own fmt headers: the system's must not be seen beside them, so sources that
    # include ATen get fmt from torch's include folder, header only.
    target_link_libraries(${target} PRIVATE LibTorch::torch_cpu)
    target_compile_definitions(${target} PRIVATE
      AT_PER_OPERATOR_HEADERS FMT_HEADER_ONLY MESHLOOM_BUILDING_FULL)
    set_property(GLOBAL APPEND PROPERTY MESHLOOM_FULL_HEADERS ${arg_HEADERS})
    set_property(GLOBAL APPEND PROPERTY MESHLOOM_FULL_OBJECTS ${target})
    set_property(GLOBAL APPEND PROPERTY MESHLOOM_FULL_LIBRARIES ${arg_LIBRARIES})
  else()
    target_link_libraries(${target} PRIVATE fmt::fmt)
    target_compile_definitions(${target} PRIVATE MESHLOOM_BUILDING_PLAN)
    set_property(GLOBAL APPEND PROPERTY MESHLOOM_PLAN_HEADERS ${arg_HEADERS})
    set_property(GLOBAL APPEND PROPERTY MESHLOOM_PLAN_OBJECTS ${target})
    set_property(GLOBAL APPEND PROPERTY MESHLOOM_PLAN_LIBRARIES ${arg_LIBRARIES})
  endif()
endfunction()

# meshloom_add_test(<name> [TORCH] [RANKS n ...] SOURCES ... [LIBRARIES ...] [LABELS ...])
# One GoogleTest program a module. With RANKS it is also started under mpirun, once per rank count.
function(meshloom_add_test name)
  cmake_parse_arguments(arg "TORCH" "TIMEOUT" "RANKS;SOURCES;LIBRARIES;LABELS" ${ARGN})
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  add_executable(${name} ${arg_SOURCES})
  meshloom_compile_flags(${name})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/src" "${PROJECT_SOURCE_DIR}/tests")
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} nlohmann_json::nlohmann_json
    Threads::Threads GTest::gtest)
  if(arg_TORCH)
    target_link_libraries(${name} PRIVATE meshloom::meshloom LibTorch::torch_cpu)
    target_compile_definitions(${name} PRIVATE AT_PER_OPERATOR_HEADERS FMT_HEADER_ONLY)
  else()
    target_link_libraries(${name} PRIVATE meshloom::plan fmt::fmt)
  endif()
  if(arg_RANKS)
    foreach(ranks ${arg_RANKS})
      add_test(NAME ${name}_${ranks}
        COMMAND ${MPIEXEC_EXECUTABLE} --allow-run-as-root --oversubscribe --mca mpi_yield_when_idle 1
          ${MPIEXEC_NUMPROC_FLAG} ${ranks} $<TARGET_FILE:${name}>)
      set_tests_properties(${name}_${ranks} PROPERTIES PROCESSORS 2 TIMEOUT ${arg_TIMEOUT}
        LABELS "distributed;${arg_LABELS}" ENVIRONMENT "OMP_NUM_THREADS=1;OMP_WAIT_POLICY=passive")
    endforeach()
  else()
    target_link_libraries(${name} PRIVATE GTest::gtest_main)
    add_test(NAME ${name} COMMAND ${name})
    set_tests_properties(${name} PROPERTIES TIMEOUT ${arg_TIMEOUT} LABELS "unit;${arg_LABELS}"
      ENVIRONMENT "OMP_NUM_THREADS=2;OMP_WAIT_POLICY=passive")
  endif()
endfunction()

function(meshloom_print_summary)
  message(STATUS "meshloom ${PROJECT_VERSION}")
  message(STATUS "  build type       ${CMAKE_BUILD_TYPE}${MESHLOOM_SANITIZE}")
  message(STATUS "  LibTorch         ${MESHLOOM_HAS_TORCH} ${LibTorch_VERSION}")
  message(STATUS "  MPI              ${MESHLOOM_HAS_MPI} ${MPI_C_VERSION}")
  message(STATUS "  CUDA toolkit     ${MESHLOOM_HAS_CUDA} ${CUDAToolkit_VERSION}")
  message(STATUS "  NCCL             ${MESHLOOM_HAS_NCCL} ${NCCL_VERSION}")
  message(STATUS "  SentencePiece    ${MESHLOOM_HAS_SENTENCEPIECE}")
  message(STATUS "  Python modules   ${MESHLOOM_BUILD_PYTHON} (${Python_EXECUTABLE})")
  message(STATUS "  tests, examples  ${MESHLOOM_BUILD_TESTS}, ${MESHLOOM_BUILD_EXAMPLES}")
endfunction()
