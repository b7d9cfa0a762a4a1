// The tile of a product that one warp makes from operands in shared memory (rows.cuh): strips of 16 rows of A by up to
// 8 · kUnits columns of B. 16-bit types are multiplied by mma, and f32 by FMAs, so that it stays f32. Sums are f32 and
// run over k in one fixed order.
#pragma once

#include "kernels/cuda/mlp/rows.cuh"

namespace dlk::cuda {

constexpr int kUnitColumns = 8;
constexpr int kStrip = 16;  // rows

// kAAlongK, kBAlongK: the operand is contiguous along k. The sums are acc[kUnits of the first strip, then of the
// next][4]. A product with few columns uses only the first `units` of a strip.
template <class T, int kUnits, bool kAAlongK, bool kBAlongK, int kStrips = 1>
struct WarpTile {
  static constexpr bool kMma = sizeof(T) == 2;
  static constexpr int kStep = kMma ? 16 : 4;                      // steps of k at once
  static constexpr int kNeighbours = kMma ? 2 : kBAlongK ? 1 : 4;  // neighbouring columns among the four sums of a unit
  static constexpr int kRows = kStrips * kStrip, kColumns = kUnits * kUnitColumns;
  static_assert(kColumns % kPadding<T> == 0);
  using Sums = float[kStrips * kUnits][4];
  using RowSums = float[kStrips][4];  // row sums of A; see sum_row

  DLK_HD static int units(int cols) { return round_up(cols, kPadding<T>) / kUnitColumns; }

  // Return the row and the column of acc[q][e] of this lane in the tile.
  DLK_DEVICE static int row(int q, int e) {
    const int lane = threadIdx.x % 32, strip = q / kUnits * kStrip;
    if constexpr (kMma) return strip + lane / 4 + e / 2 * 8;
    return strip + (kAAlongK ? lane / 8 + q % 4 * 4 : lane / 8 * 4 + q % 4);
  }
  DLK_DEVICE static int col(int q, int e) {
    const int lane = threadIdx.x % 32, unit = q % kUnits;
    if constexpr (kMma) return unit * 8 + lane % 4 * 2 + e % 2;
    return unit / 4 * 32 + (kBAlongK ? lane % 8 + e * 8 : lane % 8 * 4 + e);
  }

  // Call f(sums, q) for the four sums acc[q] of every one of the first `units`.
  template <class F>
  DLK_DEVICE static void each_unit(int units, Sums& acc, F&& f) {
#pragma unroll
    for (int q = 0; q < kStrips * kUnits; ++q)
      if (q % kUnits < units) f(acc[q], q);
  }
  // Call f(sum, row, col) for every sum in the first `units`.
  template <class F>
  DLK_DEVICE static void each(int units, Sums& acc, F&& f) {
    each_unit(units, acc, [&](float (&sums)[4], int q) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(sums[e], row(q, e), col(q, e));
    });
  }

  // Store the sums to shared memory, rounded, with zeros outside [rows, cols].
  DLK_DEVICE static void store(T* to, int pitch, int rows, int cols, int units, const Sums& acc) {
#pragma unroll
    for (int q = 0; q < kStrips * kUnits; ++q) {
      if (q % kUnits >= units) continue;
#pragma unroll
      for (int e = 0; e < 4; e += kNeighbours) {
        const int r = row(q, e), c = col(q, e);
        Pack<T, kNeighbours> pack;
#pragma unroll
        for (int i = 0; i < kNeighbours; ++i) narrow(r < rows && c + i < cols ? acc[q][e + i] : 0.0f, &pack.at[i]);
        *reinterpret_cast<Pack<T, kNeighbours>*>(to + r * pitch + c) = pack;
      }
    }
  }

  // acc += A · B over `steps` steps of k. a and b point to the first element of A and of B in the tile.
  DLK_DEVICE static void multiply(const T* a, int a_pitch, const T* b, int b_pitch, int steps, int units, Sums& acc) {
    run<false>(a, a_pitch, b, b_pitch, steps, units, acc, nullptr);
  }
  // The same, and sums += A · 1.
  DLK_DEVICE static void multiply(const T* a, int a_pitch, const T* b, int b_pitch, int steps, int units, Sums& acc,
                                  RowSums& sums) {
    run<true>(a, a_pitch, b, b_pitch, steps, units, acc, sums);
  }

  // Return the row that sums[strip][e] belongs to. Several lanes hold the same sum, and one of them owns it.
  DLK_DEVICE static int sum_row(int strip, int e) {
    const int lane = threadIdx.x % 32;
    return strip * kStrip + (kMma ? lane / 4 + e / 2 * 8 : lane / 8 * 4 + e);
  }
  DLK_DEVICE static bool owns_sum(int e) {
    const int lane = threadIdx.x % 32;
    return kMma ? lane % 4 == 0 && e % 2 == 0 : lane % 8 == 0;
  }

 private:
  template <bool kRowSums>
  DLK_DEVICE static void run(const T* a, int a_pitch, const T* b, int b_pitch, int steps, int units, Sums& acc,
                             float (*sums)[4]) {
    if constexpr (kMma)
      multiply_mma<kRowSums>(a, a_pitch, b, b_pitch, steps, units, acc, sums);
    else
      multiply_fma<kRowSums>(a, a_pitch, b, b_pitch, steps, units, acc, sums);
  }

  template <bool kRowSums>
  DLK_DEVICE static void multiply_mma(const T* a, int a_pitch, const T* b, int b_pitch, int steps, int units, Sums& acc,
                                      float (*sums)[4]) {
    const int lane = threadIdx.x % 32, q = lane / 8, l = lane % 8;  // row l of matrix q of ldmatrix
    a += kAAlongK ? (q % 2 * 8 + l) * a_pitch + q / 2 * 8 : (q / 2 * 8 + l) * a_pitch + q % 2 * 8;
    b += kBAlongK ? (q / 2 * 8 + l) * b_pitch + q % 2 * 8 : (q % 2 * 8 + l) * b_pitch + q / 2 * 8;
    Pack<T, 2> one;
    narrow(1.0f, &one.at[0]), narrow(1.0f, &one.at[1]);
    const uint32_t ones = *reinterpret_cast<const uint32_t*>(&one);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint32_t fa[kStrips][4];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        if constexpr (kAAlongK)
          ldmatrix_x4(fa[s], a + s * kStrip * a_pitch + step * 16);
        else
          ldmatrix_x4_trans(fa[s], a + s * kStrip + step * 16 * a_pitch);
        if constexpr (kRowSums) mma(sums[s], fa[s], {ones, ones}, T{});
      }
#pragma unroll
      for (int j = 0; j < kUnits / 2; ++j) {
        if (j * 2 >= units) continue;
        uint32_t fb[4];
        if constexpr (kBAlongK)
          ldmatrix_x4(fb, b + j * 16 * b_pitch + step * 16);
        else
          ldmatrix_x4_trans(fb, b + step * 16 * b_pitch + j * 16);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          mma(acc[s * kUnits + j * 2], fa[s], {fb[0], fb[1]}, T{});
          mma(acc[s * kUnits + j * 2 + 1], fa[s], {fb[2], fb[3]}, T{});
        }
      }
    }
  }

  using Quad = Pack<float, 4>;
  DLK_DEVICE static Quad quad(const float* at) { return *reinterpret_cast<const Quad*>(at); }

  template <bool kRowSums>
  DLK_DEVICE static void multiply_fma(const float* a, int a_pitch, const float* b, int b_pitch, int steps, int units,
                                      Sums& acc, float (*sums)[4]) {
    static_assert(!kRowSums || !kAAlongK, "a lane reads all k of a row only where k runs down a column");
    const int lane = threadIdx.x % 32;
    a += kAAlongK ? lane / 8 * a_pitch : lane / 8 * 4;
    b += kBAlongK ? lane % 8 * b_pitch : lane % 8 * 4;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Quad fa[kStrips][4];  // along k: one quad per row; otherwise one quad per step of k
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          fa[s][i] = quad(kAAlongK ? a + (s * kStrip + i * 4) * a_pitch + step * 4
                                   : a + s * kStrip + (step * 4 + i) * a_pitch);
          if constexpr (kRowSums) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[s][e] += fa[s][i].at[e];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kUnits / 4; ++j) {
        if (j * 4 >= units) continue;
        Quad fb[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          fb[i] = quad(kBAlongK ? b + (j * 32 + i * 8) * b_pitch + step * 4 : b + (step * 4 + i) * b_pitch + j * 32);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int m = 0; m < 4; ++m) {
#pragma unroll
              for (int e = 0; e < 4; ++e)
                acc[s * kUnits + j * 4 + m][e] +=
                    (kAAlongK ? fa[s][m].at[k] : fa[s][k].at[m]) * (kBAlongK ? fb[e].at[k] : fb[k].at[e]);
            }
          }
        }
      }
    }
  }
};

}  // namespace dlk::cuda
