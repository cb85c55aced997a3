# Finds nvcc, settles the architectures, and gives CUDA sources their flags.
# Sets CONDENSATE_WITH_CUDA and CONDENSATE_BUILT_ARCHS.

set(CONDENSATE_WITH_CUDA OFF)
set(CONDENSATE_BUILT_ARCHS "")
set(CMAKE_CUDA_ARCHITECTURES OFF)  # each target names its own

string(TOUPPER "${CONDENSATE_CUDA}" cuda_wanted)
if(NOT cuda_wanted MATCHES "^(AUTO|ON|OFF|1|0)$")
  message(FATAL_ERROR "CONDENSATE_CUDA is '${CONDENSATE_CUDA}'; use AUTO, ON or OFF.")
endif()

if(cuda_wanted STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CONDENSATE_WITH_CUDA ON)
  else()
    message(NOTICE "condensate: nvcc was not found, so this build has the CPU kernels only. "
                   "For the CUDA kernels put nvcc on PATH or set CUDACXX, then build again.")
  endif()
elseif(cuda_wanted)
  set(CONDENSATE_WITH_CUDA ON)
endif()

if(NOT CONDENSATE_WITH_CUDA)
  return()
endif()

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

if(NOT CONDENSATE_ARCHS AND DEFINED ENV{CONDENSATE_ARCHS})
  set(CONDENSATE_ARCHS "$ENV{CONDENSATE_ARCHS}")
endif()
if(NOT CONDENSATE_ARCHS)
  set(CONDENSATE_ARCHS "80;86;89;90;100;120")
endif()
string(REGEX REPLACE "[, ]+" ";" CONDENSATE_ARCHS "${CONDENSATE_ARCHS}")
foreach(arch IN LISTS CONDENSATE_ARCHS)
  if(NOT arch MATCHES "^[0-9]+a?$" OR arch LESS 80 AND NOT arch MATCHES "a$")
    message(FATAL_ERROR "CONDENSATE_ARCHS has '${arch}'; use numbers from 80 on, e.g. \"80;90a\".")
  endif()
endforeach()

# Portable files are built for the plain number; 90 and 90a both give the files in sm90/ folders
# their wgmma and TMA target, sm_90a, which no other file may use.
set(portable_archs "")
set(CONDENSATE_HOPPER OFF)
foreach(arch IN LISTS CONDENSATE_ARCHS)
  string(REGEX REPLACE "a$" "" number "${arch}")
  list(APPEND portable_archs "${number}")
  if(number EQUAL 90)
    set(CONDENSATE_HOPPER ON)
  endif()
endforeach()
list(REMOVE_DUPLICATES portable_archs)
list(POP_BACK portable_archs last_arch)
list(TRANSFORM portable_archs APPEND "-real")
set(CONDENSATE_PORTABLE_ARCHS "${portable_archs};${last_arch}")  # no suffix: SASS and PTX
list(REMOVE_ITEM CONDENSATE_PORTABLE_ARCHS "")
list(JOIN CONDENSATE_ARCHS "," CONDENSATE_BUILT_ARCHS)
string(APPEND CONDENSATE_BUILT_ARCHS "+ptx")
message(STATUS "condensate: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CONDENSATE_BUILT_ARCHS}")

# ptxas -v puts registers and spills of every kernel into the build log, for tools that check it.
add_library(condensate_cuda_options INTERFACE)
set(nvcc_flags --extended-lambda --expt-relaxed-constexpr -Xptxas=-v -Xfatbin=-compress-all
               -Xcompiler=-Wall,-Wextra -lineinfo)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  list(APPEND nvcc_flags --compress-mode=size)
endif()
if(CONDENSATE_WERROR)
  list(APPEND nvcc_flags -Werror=all-warnings)  # spills: tools/check_ptxas.py
endif()
target_compile_options(condensate_cuda_options INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:${nvcc_flags}>")
