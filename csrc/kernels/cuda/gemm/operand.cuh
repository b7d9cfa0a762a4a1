// A tile of A or B: from global memory through shared memory to the registers of mma.
//
// Shared memory has the rows of the tile as global memory has them, along k or across k, in chunks of 16 bytes. Chunk c
// of row r is stored at c ^ f(r), so that the 8 rows that ldmatrix reads at once lie in 8 different groups of banks.
#pragma once

#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {

// Return the byte offset of a chunk in a tile with kChunks chunks per row. 8 chunks are one line of all 32 banks.
template <int kChunks>
DLK_DEVICE int swizzled(int row, int chunk) {
  constexpr int kRowsPerLine = kChunks < 8 ? 8 / kChunks : 1;
  constexpr int kMask = (kChunks < 8 ? kChunks : 8) - 1;
  return (row * kChunks + (chunk ^ (row / kRowsPerLine & kMask))) * 16;
}

// kExtent rows of A (or columns of B) by kTileK steps of k, in 16-bit elements. kAlongK: k is the contiguous direction.
template <class T, bool kAlongK, int kExtent, int kTileK, int kThreads>
struct Operand {
  static constexpr int kRows = kAlongK ? kExtent : kTileK, kCols = kAlongK ? kTileK : kExtent;
  static constexpr int kChunk = kPack<T>, kChunks = kCols / kChunk;
  static constexpr int kBytes = kRows * kCols * static_cast<int>(sizeof(T));
  static constexpr int kRowStep = kThreads / kChunks;  // rows between two chunks of one thread
  static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0);
  static_assert(kChunks >= 4 && kCols % kChunk == 0);

  // The operand in global memory, with rows and columns as in shared memory.
  struct Source {
    const T* data;
    int64_t row_stride, col_stride, rows, cols;
    bool asynchronous;  // every chunk is one aligned 16-byte read
  };

  // `view` is [extent, k], and k ends at k_end.
  DLK_DEVICE static Source source(const View& view, int64_t extent, int64_t k_end) {
    Source s{static_cast<const T*>(view.data), view.row_stride, view.col_stride, extent, k_end, false};
    if (!kAlongK) s = {s.data, view.col_stride, view.row_stride, k_end, extent, false};
    s.asynchronous = s.col_stride == 1 && s.row_stride % kChunk == 0 && reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
    return s;
  }

  // Loads the tiles of a source that is asynchronous, one after the other along k, with cp.async. Addresses and edges are
  // worked out once, and a tile adds constants to them: the loop over tiles has little time beside its products.
  struct Walk {
    const T* from;                // this thread's first chunk of the next tile
    int64_t row_step, tile_step;  // elements to its next row, and to the next tile
    int64_t left;                 // steps of k from its first chunk on
    int inside;                   // along k: its rows that exist; across k: the bytes of its chunks

    DLK_DEVICE Walk(const Source& s, int64_t i0, int64_t k0) {
      const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
      const int64_t row = (kAlongK ? i0 : k0) + first, col = (kAlongK ? k0 : i0) + chunk * kChunk;
      from = s.data + row * s.row_stride + col;
      row_step = kRowStep * s.row_stride;
      tile_step = kAlongK ? kTileK : kTileK * s.row_stride;
      left = kAlongK ? s.cols - col : s.rows - row;
      inside = static_cast<int>(kAlongK ? max(int64_t{0}, min(int64_t{kRows}, ceil_div(s.rows - row, kRowStep)))
                                        : max(int64_t{0}, min(int64_t{kChunk}, s.cols - col)) * sizeof(T));
    }

    DLK_DEVICE void load(unsigned char* tile) {
      const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
      const int bytes = kAlongK ? static_cast<int>(max(int64_t{0}, min(int64_t{kChunk}, left)) * sizeof(T)) : inside;
#pragma unroll
      for (int i = 0; i < kRows / kRowStep; ++i) {
        const bool exists = kAlongK ? i < inside : i * kRowStep < left;
        cp_async_16(tile + swizzled<kChunks>(first + i * kRowStep, chunk), from + i * row_step, exists ? bytes : 0);
      }
      from += tile_step, left -= kTileK;
    }
  };

  // Load the tile element by element, through registers. change(row, col, exist, v) may change a chunk from column `col`
  // on, of which the first `exist` elements are inside the source; the others are zero.
  template <class F>
  DLK_DEVICE static void load_changed(unsigned char* tile, const Source& s, int64_t i0, int64_t k0, F&& change) {
    const int64_t row0 = kAlongK ? i0 : k0, col0 = kAlongK ? k0 : i0;
    const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const int64_t col = col0 + chunk * kChunk;
    const int in_row = static_cast<int>(max(int64_t{0}, min(int64_t{kChunk}, s.cols - col)));
#pragma unroll 1
    for (int row = first; row < kRows; row += kRowStep) {
      const int exist = row0 + row < s.rows ? in_row : 0;
      const T* from = s.data + (row0 + row) * s.row_stride + col * s.col_stride;
      float v[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) v[e] = e < exist ? widen(from[e * s.col_stride]) : 0.0f;
      change(row0 + row, col, exist, v);
      Pack<T, kChunk> pack;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) narrow(e < exist ? v[e] : 0.0f, &pack.at[e]);
      *reinterpret_cast<Pack<T, kChunk>*>(tile + swizzled<kChunks>(row, chunk)) = pack;
    }
  }

  // The same, without changes.
  DLK_DEVICE static void load_plain(unsigned char* tile, const Source& s, int64_t i0, int64_t k0) {
    load_changed(tile, s, i0, k0, [](int64_t, int64_t, int, float (&)[kChunk]) {});
  }

  // Load the registers a[0..3] of mma for rows i ... i + 15 of A and step `step` of the tile (ptx.cuh has the layout).
  DLK_DEVICE static void fragment_a(const unsigned char* tile, int i, int step, uint32_t (&r)[4]) {
    const int lane = threadIdx.x % 32, q = lane / 8, l = lane % 8;
    if constexpr (kAlongK) {
      ldmatrix_x4(r, tile + swizzled<kChunks>(i + q % 2 * 8 + l, step * 2 + q / 2));
    } else {
      ldmatrix_x4_trans(r, tile + swizzled<kChunks>(step * 16 + q / 2 * 8 + l, i / 8 + q % 2));
    }
  }

  // Load the registers b[0..1] of mma for columns j ... j + 7 of B, then for the next eight columns.
  DLK_DEVICE static void fragment_b(const unsigned char* tile, int j, int step, uint32_t (&r)[4]) {
    const int lane = threadIdx.x % 32, q = lane / 8, l = lane % 8;
    if constexpr (kAlongK) {
      ldmatrix_x4(r, tile + swizzled<kChunks>(j + q / 2 * 8 + l, step * 2 + q % 2));
    } else {
      ldmatrix_x4_trans(r, tile + swizzled<kChunks>(step * 16 + q % 2 * 8 + l, j / 8 + q / 2));
    }
  }
};

}  // namespace dlk::cuda
