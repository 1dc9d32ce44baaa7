// Host side of TMA: descriptors of matrices in global memory, encoded by the driver. The driver function is looked up
// at the first call, so the module does not link libcuda and loads on machines without it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "common/cuda/box.h"
#include "common/cuda/launch.h"
#include "common/cuda/sm90_atoms.h"

namespace mmk::cuda {

inline TensorMap tensor_map(DType dtype, const Box& box) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
#endif
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("mmkernels: cuTensorMapEncodeTiled not found: the CUDA driver is older than 12.0");
    }
    return reinterpret_cast<Encode>(function);
  }();
  cuuint64_t size[Box::kMaxRank], stride[Box::kMaxRank];
  cuuint32_t extent[Box::kMaxRank], step[Box::kMaxRank];
  for (int i = 0; i < box.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(box.size[i]);
    extent[i] = static_cast<cuuint32_t>(box.box[i]);
    step[i] = 1;
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(box.stride[i]) * 2;
  }
  CUtensorMap map;
  static_assert(sizeof map == sizeof(TensorMap), "opaque");
  const CUresult status =
      encode(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             static_cast<cuuint32_t>(box.rank), const_cast<void*>(box.data), size, stride, extent, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::ostringstream message;
    message << "mmkernels: cuTensorMapEncodeTiled failed with " << static_cast<int>(status);
    throw std::runtime_error(message.str());
  }
  TensorMap result;
  std::memcpy(&result, &map, sizeof map);
  return result;
}

}  // namespace mmk::cuda
