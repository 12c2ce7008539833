# The headers need nothing but the C++20 standard library, so neither does a consumer.
include(${CMAKE_CURRENT_LIST_DIR}/chameleonTargets.cmake)
