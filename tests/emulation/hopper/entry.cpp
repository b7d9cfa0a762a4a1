// The Hopper kernel and its arithmetic with C signatures, for ctypes; and, on the host, the driver that encodes tensor
// maps.
#include <cudaTypedefs.h>

#include "kernels/cuda/gemm/hopper/ring.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/gemm/tile.cuh"
#include "../cuda/run.h"

#ifndef __CUDACC__
namespace {

// Check the requirements of cuTensorMapEncodeTiled (cuda.h) for a map of 16-bit elements in two dimensions, without
// interleaving.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* size,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  bool legal = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  legal &= rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  legal &= reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int d = 0; d < 2; ++d) {
    legal &= size[d] > 0 && size[d] <= uint64_t{1} << 32;
    legal &= box[d] > 0 && box[d] <= 256 && step[d] == 1;
  }
  legal &= stride[0] % 16 == 0 && stride[0] < uint64_t{1} << 40 && stride[0] >= size[0] * 2;
  legal &= box[0] * 2 % 16 == 0 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 <= 128;
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const unsigned char*>(data), {size[0], size[1]}, stride[0], {box[0], box[1]}};
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && version >= 12000;
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
#endif

extern "C" {

// Run a product. tile: columns of a tile of C. takes receives the result of hopper_takes; if it is false, nothing runs.
int hopper_gemm(int tile, int dtype, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_col,
                const void* b, int64_t b_row, int64_t b_col, int act, double slope, const void* bias, void* c, void* z,
                const void* below_saved, int below_act, void* column_sum, int splits, void* partials, const void* saved,
                void* row_sum, void* mask, int below_is_mask, int* takes) {
  dlk::cuda::Gemm p{};
  p.dtype = static_cast<dlk::DType>(dtype);
  p.m = m, p.n = n, p.k = k;
  p.a = {a, a_row, a_col};
  p.b = {b, b_row, b_col};
  p.saved = {saved, a_row, a_col};
  p.act = {static_cast<dlk::Act>(act), slope};
  p.bias = bias, p.c = c, p.z = z, p.below_saved = below_saved, p.column_sum = column_sum, p.row_sum = row_sum;
  p.below_act = {static_cast<dlk::Act>(below_act), slope};
  p.splits = splits, p.partials = partials;
  p.mask = mask, p.below_is_mask = below_is_mask;
  p.tile = tile;
#ifndef __CUDACC__
  // With 3 SMs a block has several tiles in turn, and blocks have different numbers of tiles.
  cuda_emulation::device.processors = 3;
#endif
  *takes = dlk::cuda::hopper_takes(p);
  return run([&] { return dlk::cuda::hopper_gemm(p, nullptr); });
}

#ifndef __CUDACC__
int hopper_available(int major, int minor, int most_threads) {
  auto& device = cuda_emulation::device;
  const auto before = device;
  device.major = major, device.minor = minor, device.most_threads = most_threads;
  const bool available = dlk::cuda::hopper_available();
  device = before;
  return available;
}
#endif

uint64_t shared_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return dlk::cuda::shared_descriptor(address, leading_bytes, stride_bytes);
}

void tile_at(int64_t tile, int64_t tiles_m, int64_t tiles_n, int64_t* i, int64_t* j) {
  const auto at = dlk::cuda::tile_at(tile, tiles_m, tiles_n);
  *i = at.i, *j = at.j;
}

}  // extern "C"
