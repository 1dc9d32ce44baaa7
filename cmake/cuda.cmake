# mmk_add_cuda_kernels(target files...): adds the CUDA kernels when nvcc is to be had; including this file says when not.
# The runtime is linked statically, so that the module loads without a driver and survives a change of torch's CUDA.

set(MMK_HAS_CUDA FALSE)
if(NOT MMKERNELS_CUDA STREQUAL "OFF")
  # Toolkits are often installed off PATH.
  if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
    find_program(MMK_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
    if(MMK_NVCC)
      set(CMAKE_CUDA_COMPILER ${MMK_NVCC} CACHE FILEPATH "nvcc" FORCE)
    endif()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(MMK_HAS_CUDA TRUE)
  elseif(MMKERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "mmkernels: MMKERNELS_CUDA=ON but no working nvcc was found (PATH, CUDACXX, CUDA_HOME)")
  else()
    message(WARNING "mmkernels: no nvcc found: the native core is built for CPU only (Triton still serves GPUs)")
  endif()
endif()

if(MMK_HAS_CUDA)
  # At file scope: in a function the language's variables would be lost.
  string(REPLACE "," ";" CMAKE_CUDA_ARCHITECTURES "${MMKERNELS_CUDA_ARCHS}")
  set(CMAKE_CUDA_STANDARD 17)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
endif()

function(mmk_add_cuda_kernels target)
  if(NOT MMK_HAS_CUDA)
    return()
  endif()
  add_library(${target}_cuda OBJECT ${ARGN})
  set_target_properties(${target}_cuda PROPERTIES
    CUDA_STANDARD 17 POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
  target_include_directories(${target}_cuda PRIVATE csrc)
  target_compile_options(${target}_cuda PRIVATE --expt-relaxed-constexpr -lineinfo)
  target_sources(${target} PRIVATE csrc/module_cuda.cpp $<TARGET_OBJECTS:${target}_cuda>)
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  target_compile_definitions(${target} PRIVATE MMK_HAVE_CUDA MMK_CUDA_ARCHS="${MMKERNELS_CUDA_ARCHS}"
                             MMK_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")
endfunction()
