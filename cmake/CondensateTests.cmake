# condensate_tests: GoogleTest over the torch-free library.

enable_testing()
find_package(GTest REQUIRED)
file(GLOB test_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/*.cc")
add_executable(condensate_tests ${test_sources})
target_include_directories(condensate_tests PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
target_compile_definitions(condensate_tests PRIVATE
  $<$<BOOL:${CONDENSATE_WITH_CUDA}>:CONDENSATE_WITH_CUDA=1>)
target_link_libraries(condensate_tests PRIVATE
  condensate_options condensate_core GTest::gtest_main
  $<$<BOOL:${CONDENSATE_WITH_CUDA}>:CUDA::cudart_static>)
include(GoogleTest)
gtest_discover_tests(condensate_tests DISCOVERY_TIMEOUT 60)
include(CondensateEmulate)
