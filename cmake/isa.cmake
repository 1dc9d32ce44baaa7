# CPU kernels for several instruction sets in one binary.
#
# mmk_add_cpu_kernels(<target> <file>_cpu.cpp ...) compiles every file once per set, as an object library whose objects
# go into <target>, with MMK_ISA naming the set. <target> and all its objects see MMK_HAVE_<SET> for each set beyond the
# baseline; csrc/common/dispatch.cpp chooses among them at load.
#
# -ffp-contract=fast allows FMA; -ffast-math is not used, because infinities and NaNs are meaningful (masked rows).
include(CheckCXXCompilerFlag)

set(MMK_CPU_FLAGS -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast)
set(MMK_ISAS baseline)
set(MMK_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(MMK_FLAGS_baseline -msse2)
  set(MMK_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(MMK_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
  set(MMK_FLAGS_avx512bf16 ${MMK_FLAGS_avx512} -mavx512bf16)
  foreach(isa IN ITEMS avx2 avx512 avx512bf16)
    string(JOIN " " flags ${MMK_FLAGS_${isa}})
    check_cxx_compiler_flag("${flags}" MMK_COMPILER_HAS_${isa})
    if(MMK_COMPILER_HAS_${isa})
      list(APPEND MMK_ISAS ${isa})
    endif()
  endforeach()
endif()

set(MMK_ISA_DEFINITIONS "")
foreach(isa IN LISTS MMK_ISAS)
  if(NOT isa STREQUAL "baseline")
    string(TOUPPER "MMK_HAVE_${isa}" definition)
    list(APPEND MMK_ISA_DEFINITIONS ${definition})
  endif()
endforeach()

function(mmk_add_cpu_kernels target)
  target_compile_definitions(${target} PRIVATE ${MMK_ISA_DEFINITIONS})
  foreach(isa IN LISTS MMK_ISAS)
    set(objects ${target}_${isa})
    add_library(${objects} OBJECT ${ARGN})
    target_include_directories(${objects} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc)
    target_compile_definitions(${objects} PRIVATE MMK_ISA=${isa} ${MMK_ISA_DEFINITIONS})
    target_compile_options(${objects} PRIVATE ${MMK_CPU_FLAGS} ${MMK_FLAGS_${isa}})
    target_compile_features(${objects} PRIVATE cxx_std_17)
    set_target_properties(${objects} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()
