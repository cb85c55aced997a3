# The programs of examples/cpp: what a C++ user writes, built and run by the tests.

add_executable(attention_example "${CMAKE_CURRENT_SOURCE_DIR}/examples/cpp/attention.cc")
target_link_libraries(attention_example PRIVATE condensate_options condensate_core
  $<$<BOOL:${CONDENSATE_WITH_CUDA}>:CUDA::cudart_static>)
if(CONDENSATE_BUILD_TESTS)
  add_test(NAME attention_example COMMAND attention_example)
endif()
