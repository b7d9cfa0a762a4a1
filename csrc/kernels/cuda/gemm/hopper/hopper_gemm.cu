// The launcher of hopper_gemm.cuh: the switch from dtype, layout and size to a kernel, and its two tensor maps.
#include "kernels/cuda/gemm/hopper/hopper_gemm.cuh"
#include "kernels/cuda/gemm/slices.h"
#include "kernels/cuda/gemm/waves.h"

#include <cuda.h>
#include <cudaTypedefs.h>

namespace dlk::cuda {
namespace {

constexpr int kWide = 256, kNarrow = 128;  // columns of a tile of C; its rows are 128

// Return whether TMA can read v, [rows, cols] of 16-bit elements: contiguous along cols, with the data and the distance
// of rows aligned to 16 bytes.
bool lies_along_cols(const View& v, int64_t rows, int64_t cols) {
  constexpr int64_t kMostStride = (int64_t{1} << 40) / 2;
  // Coordinates are int32, and a box begins inside the tensor or up to three boxes of 64 behind its end.
  constexpr int64_t kMostExtent = std::numeric_limits<int32_t>::max() - 256;
  return v.col_stride == 1 && v.row_stride >= cols && v.row_stride % 8 == 0 && v.row_stride < kMostStride &&
         rows <= kMostExtent && cols <= kMostExtent && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

// The layout of both operands: that of one of the products of contiguous tensors, or another.
enum class OperandLayout { forward, dgrad, wgrad, other };

OperandLayout layout_of(const Gemm& p) {
  const bool a_along_k = lies_along_cols(p.a, p.m, p.k), b_along_n = lies_along_cols(p.b, p.k, p.n);
  if (a_along_k && lies_along_cols(p.b.transposed(), p.n, p.k)) return OperandLayout::forward;
  if (a_along_k && b_along_n) return OperandLayout::dgrad;
  if (b_along_n && lies_along_cols(p.a.transposed(), p.k, p.m)) return OperandLayout::wgrad;
  return OperandLayout::other;
}

// Return the driver's encoder of tensor maps, without linking the driver; nullptr: the driver is too old for Hopper.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = []() -> PFN_cuTensorMapEncodeTiled_v12000 {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

constexpr CUtensorMapDataType map_type(Bf16) { return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; }
constexpr CUtensorMapDataType map_type(F16) { return CU_TENSOR_MAP_DATA_TYPE_FLOAT16; }

// Describe to TMA what it will read. `view` is [extent, k]. This runs on the host and touches no stream and no device
// memory.
template <class T, class Operand>
cudaError_t encode(const View& view, int64_t extent, int64_t k, CUtensorMap* map) {
  const View rows = Operand::kAlongK ? view : view.transposed();
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(Operand::kAlongK ? k : extent),
                              static_cast<cuuint64_t>(Operand::kAlongK ? extent : k)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(rows.row_stride) * sizeof(T)};
  const cuuint32_t box[2] = {Operand::kRowBytes / sizeof(T), Operand::kBoxRows}, step[2] = {1, 1};
  const CUresult result = encoder()(map, map_type(T{}), 2, const_cast<void*>(rows.data), size, stride, box, step,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Return cudaSuccess if the current device is a Hopper GPU on which the kernels of this library can be launched. Sets
// the number of its SMs.
cudaError_t available(int* processors) {
  const RelaxedCapture relaxed;
  DeviceFacts device;
  cudaFuncAttributes kernel{};
  using Any = HopperTraits<Bf16, true, true, kNarrow>;
  for (const cudaError_t status : {device_facts(&device), cudaFuncGetAttributes(&kernel, hopper_gemm_kernel<Any>)})
    if (status != cudaSuccess) return status;
  *processors = device.processors;
  const bool built = kernel.maxThreadsPerBlock >= Any::kThreads;  // an empty kernel has 1
  return device.arch == 90 && built && encoder() ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

template <class Traits>
cudaError_t run(const Gemm& p, int processors, cudaStream_t stream) {
  using T = typename Traits::T;
  CUtensorMap map_a, map_b;
  cudaError_t status = encode<T, typename Traits::A>(p.a, p.m, p.k, &map_a);
  if (status == cudaSuccess) status = encode<T, typename Traits::B>(p.b.transposed(), p.n, p.k, &map_b);
  if (status != cudaSuccess) return status;
  const int64_t tiles = ceil_div(p.m, Traits::kTileM) * ceil_div(p.n, Traits::kTileN);
  const dim3 grid(grid_of(std::min<int64_t>(tiles, std::max(1, processors / p.splits))), 1,
                  static_cast<unsigned>(p.splits));
  status = launch(hopper_gemm_kernel<Traits>, grid, Traits::kThreads, Traits::kSharedBytes, stream, p, map_a, map_b);
  if (status != cudaSuccess) return status;
  if (p.column_sum) return sum_slices(p.dtype, p.partials, ceil_div(p.m, 64), p.n, p.column_sum, stream);
  return p.splits > 1 ? splitk_reduce(p, stream) : status;
}

template <class T, bool kAAlongK, bool kBAlongK>
cudaError_t run_layout(const Gemm& p, int processors, cudaStream_t stream) {
  auto tiles = [&](int columns) { return ceil_div(p.m, 128) * ceil_div(p.n, columns) * p.splits; };
  const bool wide = takes_large(tiles(kWide), tiles(kNarrow), 2, processors);
  const int tile = p.tile ? p.tile : wide ? kWide : kNarrow;
  return tile == kWide ? run<HopperTraits<T, kAAlongK, kBAlongK, kWide>>(p, processors, stream)
                       : run<HopperTraits<T, kAAlongK, kBAlongK, kNarrow>>(p, processors, stream);
}

template <class T>
cudaError_t run_dtype(const Gemm& p, int processors, cudaStream_t stream) {
  switch (layout_of(p)) {
    case OperandLayout::forward: return run_layout<T, true, true>(p, processors, stream);
    case OperandLayout::dgrad: return run_layout<T, true, false>(p, processors, stream);
    case OperandLayout::wgrad: return run_layout<T, false, false>(p, processors, stream);
    case OperandLayout::other: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool hopper_available() {
  int processors;
  return available(&processors) == cudaSuccess;
}

bool hopper_takes(const Gemm& p) {
  return is_16_bit(p.dtype) && p.m > 0 && p.n > 0 && p.k > 0 && !p.saved.data && !p.row_sum &&
         layout_of(p) != OperandLayout::other;
}

cudaError_t hopper_gemm(const Gemm& p, cudaStream_t stream) {
  if (!hopper_takes(p)) return cudaErrorInvalidValue;
  if ((p.column_sum && (p.splits != 1 || !p.below_saved)) || !mask_fits(p)) return cudaErrorInvalidValue;
  if (p.tile != 0 && p.tile != kNarrow && p.tile != kWide) return cudaErrorInvalidValue;
  int processors;
  const cudaError_t status = available(&processors);
  if (status != cudaSuccess) return status;
  return p.dtype == DType::bf16 ? run_dtype<Bf16>(p, processors, stream) : run_dtype<F16>(p, processors, stream);
}

}  // namespace dlk::cuda
