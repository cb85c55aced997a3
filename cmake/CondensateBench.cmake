# gpu_check: every stage once, for compute-sanitizer. decode_check: the kernels of decoding against
# the host, and their times. condensate_bench: Google Benchmark over the stages. All link the
# torch-free library alone.

set(bench_cpp "${CMAKE_CURRENT_SOURCE_DIR}/bench/cpp")
add_library(condensate_stage_data STATIC "${bench_cpp}/stage_data.cc")
target_include_directories(condensate_stage_data PUBLIC "${bench_cpp}")
target_compile_definitions(condensate_stage_data PUBLIC
  $<$<BOOL:${CONDENSATE_WITH_CUDA}>:CONDENSATE_WITH_CUDA=1>)
target_link_libraries(condensate_stage_data PUBLIC
  condensate_options condensate_core $<$<BOOL:${CONDENSATE_WITH_CUDA}>:CUDA::cudart_static>)

add_executable(gpu_check "${bench_cpp}/gpu_check/gpu_check.cc")
target_link_libraries(gpu_check PRIVATE condensate_stage_data)

if(CONDENSATE_WITH_CUDA)
  file(GLOB decode_check_sources CONFIGURE_DEPENDS "${bench_cpp}/decode_check/*.cu")
  add_executable(decode_check ${decode_check_sources})
  set_target_properties(decode_check PROPERTIES CUDA_ARCHITECTURES "${CONDENSATE_PORTABLE_ARCHS}")
  target_link_libraries(decode_check PRIVATE
    condensate_options condensate_cuda_options condensate_core CUDA::cudart_static)
endif()

find_package(benchmark QUIET)
if(benchmark_FOUND)
  add_executable(condensate_bench "${bench_cpp}/bench_stages.cc")
  target_link_libraries(condensate_bench PRIVATE
    condensate_stage_data benchmark::benchmark_main)
else()
  message(NOTICE "condensate: Google Benchmark was not found, so condensate_bench is not built.")
endif()
