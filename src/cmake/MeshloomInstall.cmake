# Install and export: components `plan` (no LibTorch) and `full`. A wheel (SKBUILD) holds the same
# tree inside the Python package, under one install component of its own.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

if(SKBUILD)
  set(_libdir meshloom/lib)
  set(_includedir meshloom/include)
  set(_plan_component python)
  set(_full_component python)
  set(_namelink NAMELINK_SKIP)  # a wheel would hold the library twice
else()
  set(_libdir "${CMAKE_INSTALL_LIBDIR}")
  set(_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
  set(_plan_component plan)
  set(_full_component full)
  set(_namelink)
endif()
set(_packagedir "${_libdir}/cmake/meshloom")

function(_meshloom_install target component)
  install(TARGETS ${target} EXPORT meshloom-${component}-targets
    LIBRARY DESTINATION "${_libdir}" COMPONENT ${_${component}_component} ${_namelink}
    FILE_SET HEADERS DESTINATION "${_includedir}" COMPONENT ${_${component}_component})
  install(EXPORT meshloom-${component}-targets NAMESPACE meshloom:: DESTINATION "${_packagedir}"
    COMPONENT ${_${component}_component})
  export(EXPORT meshloom-${component}-targets NAMESPACE meshloom::
    FILE "${PROJECT_BINARY_DIR}/meshloom-${component}-targets.cmake")
endfunction()

_meshloom_install(meshloom_plan plan)
if(MESHLOOM_HAS_TORCH)
  _meshloom_install(meshloom full)
endif()

configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/meshloom-config.cmake.in"
  "${PROJECT_BINARY_DIR}/meshloom-config.cmake" INSTALL_DESTINATION "${_packagedir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/meshloom-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
# The build tree is a package too: -Dmeshloom_DIR=<build>.
configure_file("${CMAKE_CURRENT_LIST_DIR}/FindLibTorch.cmake"
  "${PROJECT_BINARY_DIR}/FindLibTorch.cmake" COPYONLY)
install(FILES "${PROJECT_BINARY_DIR}/meshloom-config.cmake"
  "${PROJECT_BINARY_DIR}/meshloom-config-version.cmake"
  "${CMAKE_CURRENT_LIST_DIR}/FindLibTorch.cmake"
  DESTINATION "${_packagedir}" COMPONENT ${_plan_component})
