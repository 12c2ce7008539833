# Defines ONNXRuntime::ONNXRuntime.
#
# Headers come from -DONNXRUNTIME_ROOT= or from Debian's libonnxruntime-dev. The library comes, in this order, from
#   1. -DONNXRUNTIME_ROOT=  an unpacked release, with include/ and lib/, or the directory of an installed wheel
#   2. the pip wheel `onnxruntime` or `onnxruntime-gpu` of the Python interpreter (-DPython3_EXECUTABLE=)
#   3. the system's libonnxruntime; exported graphs need 1.23, in int8 1.27, and Debian 13 has 1.21
#
# A wheel has only libonnxruntime.so.1.x, whose soname is libonnxruntime.so.1. A link of that name in the build tree lets
# the loader find it through the rpath. On install a copy stands in a directory of its own, ONNXRUNTIME_TO_INSTALL: the
# installed programs need no Python, and no other program finds this library in place of the system's.

find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES include include/onnxruntime onnxruntime)

set(_onnxruntime_wheel ${ONNXRUNTIME_ROOT})
if(NOT ONNXRUNTIME_ROOT)
  find_package(Python3 COMPONENTS Interpreter QUIET)
  if(Python3_EXECUTABLE)
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -c
              "import importlib.util as u; print(u.find_spec('onnxruntime').submodule_search_locations[0])"
      OUTPUT_VARIABLE _onnxruntime_wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()
file(GLOB _onnxruntime_in_wheel ${_onnxruntime_wheel}/capi/libonnxruntime.so.1.*)

if(_onnxruntime_in_wheel)
  list(GET _onnxruntime_in_wheel 0 _onnxruntime_in_wheel)
  set(_onnxruntime_links ${CMAKE_BINARY_DIR}/onnxruntime)
  file(MAKE_DIRECTORY ${_onnxruntime_links})
  file(CREATE_LINK ${_onnxruntime_in_wheel} ${_onnxruntime_links}/libonnxruntime.so.1 SYMBOLIC)
  set(ONNXRUNTIME_LIBRARY ${_onnxruntime_links}/libonnxruntime.so.1)
  set(ONNXRUNTIME_TO_INSTALL ${_onnxruntime_in_wheel})
else()
  find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES lib)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE_DIR)
if(ONNXRuntime_FOUND AND NOT TARGET ONNXRuntime::ONNXRuntime)
  add_library(ONNXRuntime::ONNXRuntime SHARED IMPORTED)
  set_target_properties(ONNXRuntime::ONNXRuntime PROPERTIES
    IMPORTED_LOCATION ${ONNXRUNTIME_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES ${ONNXRUNTIME_INCLUDE_DIR})
endif()
