# The headers need only the C++20 standard library, so a consumer has no other dependency.
include(${CMAKE_CURRENT_LIST_DIR}/chameleonTargets.cmake)
