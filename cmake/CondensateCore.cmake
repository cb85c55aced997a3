# condensate_core: the torch-free library. C++ tests and benchmarks link it alone.

set(csrc "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
file(GLOB core_sources CONFIGURE_DEPENDS
  "${csrc}/host/*.cc" "${csrc}/host/stages/*.cc" "${csrc}/reference/*.cc" "${csrc}/cpu/*.cc")

# Summaries are rounded alike on every path: no multiply-add there.
set_source_files_properties("${csrc}/reference/kv_summaries.cc" "${csrc}/cpu/kv_summaries.cc"
  PROPERTIES COMPILE_OPTIONS "-ffp-contract=off")

add_library(condensate_core STATIC ${core_sources})
add_library(condensate::core ALIAS condensate_core)
target_include_directories(condensate_core PUBLIC "${csrc}/include" "${csrc}")
target_link_libraries(condensate_core PRIVATE condensate_options)
target_compile_definitions(condensate_core PRIVATE
  CONDENSATE_BUILT_ARCHS="${CONDENSATE_BUILT_ARCHS}"
  $<$<BOOL:${CONDENSATE_WITH_CUDA}>:CONDENSATE_WITH_CUDA=1>)

if(CONDENSATE_WITH_CUDA)
  file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS "${csrc}/host/*.cu" "${csrc}/kernels/*.cu")
  set(hopper_sources ${cuda_sources})
  list(FILTER cuda_sources EXCLUDE REGEX "/sm90/")
  list(FILTER hopper_sources INCLUDE REGEX "/sm90/")

  target_sources(condensate_core PRIVATE ${cuda_sources})
  set_target_properties(condensate_core PROPERTIES CUDA_ARCHITECTURES "${CONDENSATE_PORTABLE_ARCHS}")
  target_link_libraries(condensate_core PRIVATE condensate_cuda_options CUDA::cudart_static)

  if(CONDENSATE_HOPPER AND hopper_sources)
    # Architectures belong to a target, hence a second one.
    add_library(condensate_hopper OBJECT ${hopper_sources})
    target_include_directories(condensate_hopper PRIVATE "${csrc}/include" "${csrc}")
    target_link_libraries(condensate_hopper PRIVATE condensate_options condensate_cuda_options)
    set_target_properties(condensate_hopper PROPERTIES CUDA_ARCHITECTURES "90a-real")
    target_sources(condensate_core PRIVATE $<TARGET_OBJECTS:condensate_hopper>)
    target_compile_definitions(condensate_core PRIVATE CONDENSATE_WITH_SM90A=1)
  endif()
endif()
