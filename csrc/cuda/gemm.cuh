// C = epilogue(A · B): the three products of a layer (table in cpu/kernels.h) as one tiled kernel on plain FMAs.
//
// Right for every shape, stride and dtype; fp32 is fp32 (no TF32). Offsets are 64-bit, k is summed in one fixed
// order, nothing is atomic: the same inputs give the same bits.
#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace dlk::cuda {

template <class T_, class Act_, bool kBackward_>
struct GemmTraits {
  using T = T_;
  using Act = Act_;
  static constexpr bool kBackward = kBackward_;  // A is dz = g · act'(saved); otherwise act is the epilogue
  static constexpr int kTileM = 64, kTileN = 64, kTileK = 16;
  static constexpr int kLanesM = 16, kLanesN = 16;  // threads of a block, as a grid over the tile of C
  static constexpr int kThreads = kLanesM * kLanesN;
  static constexpr int kBlocksPerSM = 2;  // 65536 registers / (2 * 256 threads) = 128 each: room without spills
  static constexpr int kPerM = kTileM / kLanesM, kPerN = kTileN / kLanesN;  // of C per thread
  static_assert(kTileM % kLanesM == 0 && kTileN % kLanesN == 0);
  static_assert(kThreads >= kTileM, "one thread sums one row of A");
  static_assert((kTileM * kTileK) % kThreads == 0 && (kTileN * kTileK) % kThreads == 0);
};

DLK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Steps of k per slice, in whole tiles.
template <class Traits>
DLK_HD int64_t slice_length(const Gemm& p) {
  return ceil_div(ceil_div(p.k, Traits::kTileK), p.splits) * Traits::kTileK;
}

// A[i, s]; dz is made here and never exists in memory.
template <class Traits>
DLK_DEVICE Acc<typename Traits::T> load_a(const Gemm& p, int64_t i, int64_t s) {
  using T = typename Traits::T;
  const auto a = widen(static_cast<const T*>(p.a.data)[i * p.a.row_stride + s * p.a.col_stride]);
  if constexpr (Traits::kBackward) {
    using O = Ops<Acc<T>>;
    const auto saved = widen(static_cast<const T*>(p.saved.data)[i * p.saved.row_stride + s * p.saved.col_stride]);
    return Traits::Act::template grad<O>(a, saved, O::lit(p.act.slope));
  } else {
    return a;
  }
}

template <class T>
DLK_DEVICE Acc<T> load_b(const Gemm& p, int64_t s, int64_t j) {
  return widen(static_cast<const T*>(p.b.data)[s * p.b.row_stride + j * p.b.col_stride]);
}

// One slice of k, or all of it: partial sums, or the finished C[i, j].
template <class Traits>
DLK_DEVICE void store_c(const Gemm& p, int64_t i, int64_t j, Acc<typename Traits::T> acc) {
  using T = typename Traits::T;
  const int64_t at = i * p.n + j;
  if (p.splits > 1) {
    static_cast<Acc<T>*>(p.partials)[blockIdx.z * p.m * p.n + at] = acc;
  } else if constexpr (Traits::kBackward) {
    narrow(acc, static_cast<T*>(p.c) + at);
  } else {
    using O = Ops<Acc<T>>;
    const Acc<T> z = p.bias ? acc + widen(static_cast<const T*>(p.bias)[j]) : acc;
    if (p.z) narrow(z, static_cast<T*>(p.z) + at);
    narrow(Traits::Act::template value<O>(z, O::lit(p.act.slope)), static_cast<T*>(p.c) + at);
  }
}

template <class Traits>
DLK_DEVICE void store_row_sum(const Gemm& p, int64_t i, double sum) {
  using T = typename Traits::T;
  const auto acc = static_cast<Acc<T>>(sum);
  if (p.splits > 1)
    static_cast<Acc<T>*>(p.partials)[p.splits * p.m * p.n + blockIdx.z * p.m + i] = acc;
  else
    narrow(acc, static_cast<T*>(p.row_sum) + i);
}

// blockIdx.x walks the tiles of C, blockIdx.z is the slice of k.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) gemm_kernel(const Gemm p) {
  using T = typename Traits::T;
  using A = Acc<T>;
  constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kTileK = Traits::kTileK;
  constexpr int kLanesM = Traits::kLanesM, kLanesN = Traits::kLanesN;
  // One column of padding: threads that walk k write down a column, each in another bank.
  __shared__ A a_tile[kTileK][kTileM + 1];
  __shared__ A b_tile[kTileK][kTileN + 1];

  const int thread = threadIdx.x;
  const int lane_m = thread / kLanesN, lane_n = thread % kLanesN;
  // Neighbouring threads read along the contiguous direction, so that their loads share cache lines.
  const bool a_along_k = p.a.col_stride == 1;
  const bool b_along_k = p.b.row_stride == 1;
  const int64_t k_begin = blockIdx.z * slice_length<Traits>(p);
  const int64_t k_end = min(p.k, k_begin + slice_length<Traits>(p));
  const int64_t tiles_n = max(int64_t{1}, ceil_div(p.n, kTileN));  // with n = 0 row sums remain
  const int64_t tiles = ceil_div(p.m, kTileM) * tiles_n;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t i0 = tile / tiles_n * kTileM, j0 = tile % tiles_n * kTileN;
    const bool sums_rows = p.row_sum && j0 == 0 && thread < kTileM;
    A acc[Traits::kPerM][Traits::kPerN] = {};
    double row_sum = 0;  // tiles are summed in A, the tiles' sums in double: what cuts the error costs 1 of 16 adds

    for (int64_t k0 = k_begin; k0 < k_end; k0 += kTileK) {
      for (int e = thread; e < kTileM * kTileK; e += Traits::kThreads) {
        const int i = a_along_k ? e / kTileK : e % kTileM;
        const int s = a_along_k ? e % kTileK : e / kTileM;
        a_tile[s][i] = i0 + i < p.m && k0 + s < k_end ? load_a<Traits>(p, i0 + i, k0 + s) : A(0);
      }
      for (int e = thread; e < kTileN * kTileK; e += Traits::kThreads) {
        const int j = b_along_k ? e / kTileK : e % kTileN;
        const int s = b_along_k ? e % kTileK : e / kTileN;
        b_tile[s][j] = j0 + j < p.n && k0 + s < k_end ? load_b<T>(p, k0 + s, j0 + j) : A(0);
      }
      __syncthreads();
      if (sums_rows) {
        A sum = 0;
        for (int s = 0; s < kTileK; ++s) sum += a_tile[s][thread];
        row_sum += sum;
      }
#pragma unroll
      for (int s = 0; s < kTileK; ++s) {
#pragma unroll
        for (int i = 0; i < Traits::kPerM; ++i) {
#pragma unroll
          for (int j = 0; j < Traits::kPerN; ++j)
            acc[i][j] += a_tile[s][lane_m + i * kLanesM] * b_tile[s][lane_n + j * kLanesN];
        }
      }
      __syncthreads();
    }

    if (sums_rows && i0 + thread < p.m) store_row_sum<Traits>(p, i0 + thread, row_sum);
#pragma unroll
    for (int i = 0; i < Traits::kPerM; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kPerN; ++j) {
        const int64_t row = i0 + lane_m + i * kLanesM, col = j0 + lane_n + j * kLanesN;
        if (row < p.m && col < p.n) store_c<Traits>(p, row, col, acc[i][j]);
      }
    }
  }
}

// out[i] = Σ over slices of partials[slice, i], in order.
constexpr int kSumThreads = 256;
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_slices_kernel(const Acc<T>* partials, int slices, int64_t count, T* out) {
  const int64_t stride = int64_t{gridDim.x} * kSumThreads;
  for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < count; i += stride) {
    double sum = 0;
    for (int slice = 0; slice < slices; ++slice) sum += partials[slice * count + i];
    narrow(static_cast<Acc<T>>(sum), out + i);
  }
}

}  // namespace dlk::cuda
