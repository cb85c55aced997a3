# _ops: the torch operators, stable ABI, the same file for every Python version.
# _C: pybind11, build and device facts, one per Python version.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

# Asks the interpreter where an installed package lies, without importing it.
function(condensate_package_dir package result)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('${package}'); print(next(iter(s.submodule_search_locations)) if s else '', end='')"
    OUTPUT_VARIABLE directory COMMAND_ERROR_IS_FATAL ANY)
  if(NOT directory)
    message(FATAL_ERROR "${Python_EXECUTABLE} has no package '${package}'. Install it there first "
                        "(pip install ${package}), or let pip build in isolation.")
  endif()
  set(${result} "${directory}" PARENT_SCOPE)
endfunction()

condensate_package_dir(torch torch_dir)
condensate_package_dir(pybind11 pybind11_dir)

file(STRINGS "${torch_dir}/include/torch/headeronly/version.h" torch_version_lines
     REGEX "#define TORCH_VERSION_(MAJOR|MINOR) ")
string(REGEX REPLACE "[^0-9]+" "." torch_version "${torch_version_lines}")
string(REGEX REPLACE "^\\.([0-9]+\\.[0-9]+).*" "\\1" torch_version "${torch_version}")
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${torch_version} in ${torch_dir} is too old: the operators use the "
                      "stable ABI of torch 2.11. Install torch>=2.11.")
endif()

file(GLOB ops_sources CONFIGURE_DEPENDS "${csrc}/torch/*.cc")
add_library(_ops MODULE ${ops_sources})
set_target_properties(_ops PROPERTIES PREFIX "" OUTPUT_NAME "_ops.abi3" SUFFIX ".so")
target_compile_definitions(_ops PRIVATE
  TORCH_STABLE_ONLY
  TORCH_TARGET_VERSION=0x020B000000000000ULL  # torch 2.11: runs there and in everything later
  USE_CUDA)                                   # declares the stream getter; see torch/executor.cc
target_include_directories(_ops SYSTEM PRIVATE "${torch_dir}/include")
target_link_libraries(_ops PRIVATE condensate_options condensate_core)
# Nothing of torch is found by path at run time: its libraries are already in the process.
target_link_options(_ops PRIVATE
  "LINKER:--no-as-needed" "${torch_dir}/lib/libtorch.so" "${torch_dir}/lib/libtorch_cpu.so"
  "LINKER:--as-needed" "LINKER:-z,defs" "LINKER:--exclude-libs,ALL")

set(PYBIND11_FINDPYTHON NEW)
set(pybind11_ROOT "${pybind11_dir}/share/cmake/pybind11")
find_package(pybind11 CONFIG REQUIRED)
file(GLOB module_sources CONFIGURE_DEPENDS "${csrc}/python/*.cc")
pybind11_add_module(_C MODULE ${module_sources})
target_compile_definitions(_C PRIVATE
  CONDENSATE_VERSION="${PROJECT_VERSION}"
  CONDENSATE_TORCH_VERSION="${torch_version}"
  CONDENSATE_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
  CONDENSATE_BUILT_ARCHS="${CONDENSATE_BUILT_ARCHS}"
  CONDENSATE_WITH_CUDA=$<BOOL:${CONDENSATE_WITH_CUDA}>)
target_link_libraries(_C PRIVATE condensate_options condensate_core)
target_link_options(_C PRIVATE "LINKER:--exclude-libs,ALL")

install(TARGETS _ops _C LIBRARY DESTINATION condensate_ext)
