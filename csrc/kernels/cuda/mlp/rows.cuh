// Rows of a matrix between global and shared memory. In shared memory they are a pitch apart and filled with zeros up
// to whole tiles.
#pragma once

#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {

DLK_HD int round_up(int v, int to) { return (v + to - 1) / to * to; }

// The columns that a warp multiplies at once: 16 by mma (16-bit types), 32 by FMAs.
template <class T>
constexpr int kPadding = sizeof(T) == 2 ? 16 : 32;
// Return the pitch of rows, in elements. With 16 more bytes, the 8 rows that ldmatrix reads, or 8 lanes that read down
// a column in 16-byte steps, are in different banks for every width. A swizzle would need powers of two.
template <class T>
DLK_HD int pitch_of(int features) {
  return round_up(features, kPadding<T>) + 16 / static_cast<int>(sizeof(T));
}

// Threads that work together: a warp or a block.
struct Group {
  int thread, threads;
};
DLK_DEVICE Group this_warp() { return {static_cast<int>(threadIdx.x % 32), 32}; }
DLK_DEVICE Group this_block() { return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}; }

DLK_DEVICE bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The pieces of rows that one thread handles, where its group takes all pieces in order and a row has `width` of them.
// next() needs no division.
struct RowWalk {
  int row, piece;
  int row_step, piece_step, width;

  DLK_DEVICE RowWalk(Group group, int width_)
      : row(group.thread / width_),
        piece(group.thread % width_),
        row_step(group.threads / width_),
        piece_step(group.threads % width_),
        width(width_) {}
  DLK_DEVICE void next() {
    row += row_step, piece += piece_step;
    if (piece >= width) piece -= width, ++row;
  }
};

// Return the bytes of the pieces in which cp.async can copy rows of `from`: 16 or 4; 0: it cannot.
template <class T>
DLK_DEVICE int piece_of(const View& from) {
  auto lies_in = [&](int bytes) {
    return from.row_stride % (bytes / static_cast<int>(sizeof(T))) == 0 &&
           reinterpret_cast<uintptr_t>(from.data) % bytes == 0;
  };
  return from.col_stride != 1 ? 0 : lies_in(16) ? 16 : lies_in(4) ? 4 : 0;
}

// Load rows i0 ... i0 + rows of `from`, which has `cols` columns, to shared memory, with zeros behind the last column
// and, up to padded_rows, behind the last row. They are complete after this thread's cp_async_wait and a barrier. The
// copy runs in the background, except for 16-bit rows with an odd stride. i0 is a multiple of 16, so that rows without
// gaps are aligned at i0 if they are aligned at 0.
template <class T>
DLK_DEVICE void load_rows(Group group, T* to, int pitch, const View& from, int64_t i0, int rows, int cols,
                          int padded_rows) {
  constexpr int kChunk = kPack<T>;
  const T* data = static_cast<const T*>(from.data) + i0 * from.row_stride;
  const int padded_cols = round_up(cols, kPadding<T>);
  if (const int bytes = piece_of<T>(from)) {
    const int length = bytes / static_cast<int>(sizeof(T));
#pragma unroll 1
    for (RowWalk walk(group, padded_cols / length); walk.row < padded_rows; walk.next()) {
      const int row = walk.row, col = walk.piece * length;
      const int left = row < rows ? max(0, min(length, cols - col)) : 0;
      const T* const piece = left ? data + row * from.row_stride + col : data;
      if (bytes == 16)
        cp_async_16(to + row * pitch + col, piece, left * static_cast<int>(sizeof(T)));
      else
        cp_async_4(to + row * pitch + col, piece, left * static_cast<int>(sizeof(T)));
    }
    return;
  }
  const bool gapless = from.col_stride == 1 && from.row_stride == cols && aligned16(from.data);
  if (gapless) {  // the rows are read as one row, 16 bytes at a time
    const int count = rows * cols;
    for (int e = group.thread * kChunk; e < count; e += group.threads * kChunk) {
      int row = e / cols, col = e % cols;
      const bool whole = e + kChunk <= count;
      Pack<T, kChunk> pack;
      if (whole) pack = *reinterpret_cast<const Pack<T, kChunk>*>(data + e);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (e + i < count) to[row * pitch + col] = whole ? pack.at[i] : data[e + i];
        if (++col == cols) col = 0, ++row;
      }
    }
  }
  const bool down = from.row_stride == 1;  // neighbouring threads read along the contiguous direction
  for (int e = group.thread; e < padded_rows * padded_cols; e += group.threads) {
    const int row = down ? e % padded_rows : e / padded_cols, col = down ? e / padded_rows : e % padded_cols;
    const bool inside = row < rows && col < cols;
    if (inside && gapless) continue;
    if (inside)
      to[row * pitch + col] = data[row * from.row_stride + col * from.col_stride];
    else
      narrow(0.0f, to + row * pitch + col);
  }
}

// Store `cols` columns of rows in shared memory to the first columns of contiguous rows of `to`, which are to_cols
// long.
template <class T>
DLK_DEVICE void store_rows(Group group, T* to, int to_cols, int rows, int cols, const T* from, int pitch) {
  constexpr int kChunk = kPack<T>;
  if (aligned16(to) && to_cols % kChunk == 0 && cols % kChunk == 0) {
#pragma unroll 1
    for (RowWalk walk(group, cols / kChunk); walk.row < rows; walk.next())
      *reinterpret_cast<Pack<T, kChunk>*>(to + walk.row * to_cols + walk.piece * kChunk) =
          *reinterpret_cast<const Pack<T, kChunk>*>(from + walk.row * pitch + walk.piece * kChunk);
  } else {
#pragma unroll 1
    for (RowWalk walk(group, cols); walk.row < rows; walk.next())
      to[walk.row * to_cols + walk.piece] = from[walk.row * pitch + walk.piece];
  }
}
// Store whole rows to rows i0 ... i0 + rows of `to`, [.., cols].
template <class T>
DLK_DEVICE void store_rows(Group group, void* to, int64_t i0, int rows, int cols, const T* from, int pitch) {
  store_rows(group, static_cast<T*>(to) + i0 * cols, cols, rows, cols, from, pitch);
}

}  // namespace dlk::cuda
