// The common parts of the tensor-core kernels: which tile of C a block makes, and how sums go from the registers of a
// warp to memory.
#pragma once

#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {

// The place of a tile of C, in tiles. Tiles are numbered kGroup tiles down, then one to the right, so that blocks that
// run at the same time share rows of A and columns of B.
struct TileAt {
  int64_t i, j;
};
DLK_HD TileAt tile_at(int64_t tile, int64_t tiles_m, int64_t tiles_n) {
  constexpr int64_t kGroup = 8;
  const int64_t group = tile / (kGroup * tiles_n), first = group * kGroup;
  const int64_t height = min(kGroup, tiles_m - first), within = tile - first * tiles_n;
  return {first + within % height, within / height};
}

// A strip is 16 rows and kCols columns of C in one warp. Its sums go from the registers of mma, where they are
// scattered, through shared memory. Then the epilogue handles them row by row, 16 bytes at a time.
template <class T, int kCols>
struct Strip {
  static constexpr int kWidth = kPack<T>, kLanesPerRow = kCols / kWidth, kRowsAtOnce = 32 / kLanesPerRow;
  static constexpr int kPitch = kCols + 4;  // 4 floats of padding put neighbouring rows in different banks
  static constexpr int kBytes = 16 * kPitch * static_cast<int>(sizeof(float));
  static_assert(32 % kLanesPerRow == 0 && 16 % kRowsAtOnce == 0);

  // Store sums to shared memory. acc[f] is d of mma (ptx.cuh) for columns 8f ... 8f + 7.
  DLK_DEVICE static void to_shared(float* strip, const float (&acc)[kCols / 8][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int f = 0; f < kCols / 8; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<Pack<float, 2>*>(strip + (lane / 4 + half * 8) * kPitch + f * 8 + lane % 4 * 2) = {
            acc[f][half * 2], acc[f][half * 2 + 1]};
    }
    __syncwarp();
  }

  // Take the sums from shared memory through the epilogue to C[i0.., j0..]. Adds the stored values of columns kWidth
  // (lane % kLanesPerRow) and following to `column_sum`. `packs` is rows_allow_packs<T>(p).
  DLK_DEVICE static void store(const Gemm& p, int64_t i0, int64_t j0, bool packs, float* strip,
                               float (&column_sum)[kWidth]) {
    const int lane = threadIdx.x % 32, col = lane % kLanesPerRow * kWidth;
    const int64_t j = j0 + col;
#pragma unroll 1
    for (int r = lane / kLanesPerRow; r < 16; r += kRowsAtOnce) {
      const int64_t i = i0 + r;
      if (i >= p.m || j >= p.n) continue;
      float* const from = strip + r * kPitch + col;
      if (p.splits > 1) {
        auto* partials = static_cast<float*>(p.partials) + (blockIdx.z * p.m + i) * p.n + j;
        if (partials_allow_packs(p)) {
#pragma unroll
          for (int e = 0; e < kWidth; e += 4)
            if (j + e < p.n)
              *reinterpret_cast<Pack<float, 4>*>(partials + e) = *reinterpret_cast<const Pack<float, 4>*>(from + e);
        } else {
          for (int e = 0; e < kWidth && j + e < p.n; ++e) partials[e] = from[e];
        }
      } else if (packs) {
        float v[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) v[e] = from[e];
        apply_epilogue<T>(p, i, j, v);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) column_sum[e] += v[e];
      } else {
#pragma unroll 1  // apply_epilogue is long: only one copy of it. Its results replace the sums in shared memory.
        for (int e = 0; e < kWidth && j + e < p.n; ++e) {
          float v[1] = {from[e]};
          apply_epilogue<T>(p, i, j + e, v);
          from[e] = v[0];
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          if (j + e < p.n) column_sum[e] += from[e];
      }
    }
    __syncwarp();
  }

  // Sum over the rows of the warp. Every lane gets the sums.
  DLK_DEVICE static void sum_rows(float (&column_sum)[kWidth]) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
#pragma unroll
      for (int other = kLanesPerRow; other < 32; other *= 2)
        column_sum[e] += __shfl_xor_sync(0xffffffffu, column_sum[e], other);
    }
  }
};

}  // namespace dlk::cuda
