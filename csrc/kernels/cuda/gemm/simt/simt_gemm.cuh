// C = epilogue(A · B) on plain FMAs: one tiled kernel for the three products of a layer (table in params.h).
//
// It takes f32, which stays f32 (no TF32), and f64, of every shape and stride. Offsets are 64-bit. k is summed in one
// fixed order and nothing is atomic, so the same inputs give the same bits.
#pragma once

#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {

template <class T_>
struct SimtTraits {
  using T = T_;
  static constexpr int kTileM = 64, kTileN = 64, kTileK = 16;
  static constexpr int kLanesM = 16, kLanesN = 16;  // the threads of a block, as a grid over the tile of C
  static constexpr int kThreads = kLanesM * kLanesN;
  // Two blocks would leave 128 registers for a thread, which is too few for calls of the long activations. Products that
  // come here are few blocks anyway.
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kPerM = kTileM / kLanesM, kPerN = kTileN / kLanesN;  // rows and columns of C per thread
  static_assert(kTileM % kLanesM == 0 && kTileN % kLanesN == 0);
  static_assert(kThreads >= kTileM, "one thread sums one row of A");
  static_assert((kTileM * kTileK) % kThreads == 0 && (kTileN * kTileK) % kThreads == 0);
};

// Return the steps of k per slice: whole tiles.
template <int kTileK>
DLK_HD int64_t slice_length(const Gemm& p) {
  return ceil_div(ceil_div(p.k, kTileK), p.splits) * kTileK;
}

// Load A[i, s]. With `saved` it is dz, which is made here.
template <class T>
DLK_DEVICE T load_a(const Gemm& p, int64_t i, int64_t s) {
  T a[1] = {static_cast<const T*>(p.a.data)[i * p.a.row_stride + s * p.a.col_stride]};
  if (p.saved.data) {
    const T saved[1] = {static_cast<const T*>(p.saved.data)[i * p.saved.row_stride + s * p.saved.col_stride]};
    activation_gradient(p.act, a, saved);
  }
  return a[0];
}

// Load B[s, j].
template <class T>
DLK_DEVICE T load_b(const Gemm& p, int64_t s, int64_t j) {
  return static_cast<const T*>(p.b.data)[s * p.b.row_stride + j * p.b.col_stride];
}

// Store the sum of one k-slice to partials, or run the epilogue of C[i, j] if there is only one slice.
template <class T>
DLK_DEVICE void store_c(const Gemm& p, int64_t i, int64_t j, T sum) {
  if (p.splits > 1) {
    static_cast<T*>(p.partials)[(blockIdx.z * p.m + i) * p.n + j] = sum;
  } else {
    T one[1] = {sum};
    apply_epilogue<T>(p, i, j, one);
  }
}

template <class T>
DLK_DEVICE void store_row_sum(const Gemm& p, int64_t i, double sum) {
  void* const to = p.splits > 1 ? p.partials : p.row_sum;
  const int64_t at = p.splits > 1 ? p.splits * p.m * p.n + blockIdx.z * p.m + i : i;
  static_cast<T*>(to)[at] = static_cast<T>(sum);
}

// blockIdx.x is the first tile of C of the block, blockIdx.z is the k-slice.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) simt_gemm_kernel(const Gemm p) {
  using T = typename Traits::T;
  constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kTileK = Traits::kTileK;
  constexpr int kLanesM = Traits::kLanesM, kLanesN = Traits::kLanesN;
  // With one column of padding, threads that write down a column use different banks.
  __shared__ T a_tile[kTileK][kTileM + 1];
  __shared__ T b_tile[kTileK][kTileN + 1];

  const int thread = threadIdx.x;
  const int lane_m = thread / kLanesN, lane_n = thread % kLanesN;
  // Neighbouring threads read along the contiguous direction, so that their loads share cache lines.
  const bool a_along_k = p.a.col_stride == 1;
  const bool b_along_k = p.b.row_stride == 1;
  const int64_t k_begin = blockIdx.z * slice_length<kTileK>(p);
  const int64_t k_end = min(p.k, k_begin + slice_length<kTileK>(p));
  const int64_t tiles_n = max(int64_t{1}, ceil_div(p.n, kTileN));  // with n = 0 there are still row sums
  const int64_t tiles = ceil_div(p.m, kTileM) * tiles_n;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t i0 = tile / tiles_n * kTileM, j0 = tile % tiles_n * kTileN;
    const bool sums_rows = p.row_sum && j0 == 0 && thread < kTileM;
    // Each tile of k is summed separately: sqrt(16 · k) instead of k rounding errors, for 1 more addition per 16.
    T acc[Traits::kPerM][Traits::kPerN] = {};
    double row_sum = 0;

    for (int64_t k0 = k_begin; k0 < k_end; k0 += kTileK) {
      for (int e = thread; e < kTileM * kTileK; e += Traits::kThreads) {
        const int i = a_along_k ? e / kTileK : e % kTileM;
        const int s = a_along_k ? e % kTileK : e / kTileM;
        a_tile[s][i] = i0 + i < p.m && k0 + s < k_end ? load_a<T>(p, i0 + i, k0 + s) : T(0);
      }
      for (int e = thread; e < kTileN * kTileK; e += Traits::kThreads) {
        const int j = b_along_k ? e / kTileK : e % kTileN;
        const int s = b_along_k ? e % kTileK : e / kTileN;
        b_tile[s][j] = j0 + j < p.n && k0 + s < k_end ? load_b<T>(p, k0 + s, j0 + j) : T(0);
      }
      __syncthreads();
      if (sums_rows) {
        T sum = 0;
        for (int s = 0; s < kTileK; ++s) sum += a_tile[s][thread];
        row_sum += sum;
      }
      T tile_sum[Traits::kPerM][Traits::kPerN] = {};
#pragma unroll
      for (int s = 0; s < kTileK; ++s) {
#pragma unroll
        for (int i = 0; i < Traits::kPerM; ++i) {
#pragma unroll
          for (int j = 0; j < Traits::kPerN; ++j)
            tile_sum[i][j] += a_tile[s][lane_m + i * kLanesM] * b_tile[s][lane_n + j * kLanesN];
        }
      }
#pragma unroll
      for (int i = 0; i < Traits::kPerM; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::kPerN; ++j)  // the first tile is not added to 0, because 0 + -0 is 0
          acc[i][j] = k0 == k_begin ? tile_sum[i][j] : acc[i][j] + tile_sum[i][j];
      }
      __syncthreads();
    }

    if (sums_rows && i0 + thread < p.m) store_row_sum<T>(p, i0 + thread, row_sum);
#pragma unroll
    for (int i = 0; i < Traits::kPerM; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kPerN; ++j) {
        const int64_t row = i0 + lane_m + i * kLanesM, col = j0 + lane_n + j * kLanesN;
        if (row < p.m && col < p.n) store_c<T>(p, row, col, acc[i][j]);
      }
    }
  }
}

}  // namespace dlk::cuda
