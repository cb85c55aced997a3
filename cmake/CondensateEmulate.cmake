# condensate_emulate_tests: the device code of decoding on the host (tests/emulate/emulate.h). Needs
# CUDA's headers, no GPU and no nvcc, and an x86-64 GCC, whose -fsanitize=thread calls are answered.

find_path(CUDA_HEADERS cuda_fp8.h HINTS "$ENV{CUDA_HOME}/include" /usr/local/cuda/include)
mark_as_advanced(CUDA_HEADERS)
if(NOT CUDA_HEADERS OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU"
   OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" OR CONDENSATE_SANITIZE)
  message(STATUS "condensate: no condensate_emulate_tests; they need CUDA's headers and x86-64 GCC")
  return()
endif()

set(emulate_dir "${CMAKE_CURRENT_SOURCE_DIR}/tests/emulate")
file(GLOB emulated_kernels CONFIGURE_DEPENDS "${emulate_dir}/kernels/*.cc")
add_library(condensate_emulated OBJECT ${emulated_kernels})
target_compile_options(condensate_emulated PRIVATE
  -O1 -g -w -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -ffp-contract=off)
file(GLOB emulate_sources CONFIGURE_DEPENDS "${emulate_dir}/*.cc")
# Of the library the reference alone: a build with CUDA has the same kernels in it.
add_executable(condensate_emulate_tests
  ${emulate_sources} $<TARGET_OBJECTS:condensate_emulated>
  "${CMAKE_CURRENT_SOURCE_DIR}/csrc/reference/decode.cc"
  "${CMAKE_CURRENT_SOURCE_DIR}/csrc/reference/kv_summaries.cc")
foreach(target condensate_emulated condensate_emulate_tests)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  target_include_directories(${target} PRIVATE
    "${emulate_dir}/shim" "${emulate_dir}" "${CMAKE_CURRENT_SOURCE_DIR}/csrc/include"
    "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_include_directories(${target} SYSTEM PRIVATE "${CUDA_HEADERS}" "${CUDA_HEADERS}/cccl")
endforeach()
target_compile_options(condensate_emulate_tests PRIVATE -O2)
target_link_libraries(condensate_emulate_tests PRIVATE
  condensate_options GTest::gtest_main -no-pie)
gtest_discover_tests(condensate_emulate_tests DISCOVERY_TIMEOUT 60)
