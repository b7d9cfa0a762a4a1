// How the gradient passes are cut in blocks: a function of the shape alone.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch.cuh"

namespace dlk::cuda {

constexpr int kGradPassThreads = 128;
constexpr int kGradPassBlocks = 4;  // per SM; each has 4 to 8 KiB of loads under way

struct GradPassCut {
  int lanes;       // threads along a row, a power of 2
  int64_t tiles;   // of columns
  int64_t rows;    // of a slice
  int64_t slices;  // of all rows
};

// Rows are cut for this many blocks, as many as the largest devices run at once: by the shape alone, so that another
// device adds up in the same order.
constexpr int64_t kBlocks = 512;
// Up to this many rows are one slice, because a second launch would cost more than it saves. A block takes few columns
// then, so that there are enough blocks.
constexpr int64_t kFewRows = 512;
constexpr int kFewLanes = 4;

inline int width_of(int64_t n, DType dtype) {
  const int pack = dtype == DType::f64 ? 2 : dtype == DType::f32 ? 4 : 8;
  return n % pack == 0 ? pack : 1;
}

inline GradPassCut cut_of(int64_t m, int64_t n, DType dtype) {
  const int64_t runs = n / width_of(n, dtype);
  GradPassCut cut{1, 1, 1, 1};
  const bool few = m <= kFewRows;
  while (cut.lanes < (few ? kFewLanes : 32) && cut.lanes < runs) cut.lanes *= 2;
  const int64_t step = kGradPassThreads / cut.lanes, steps = std::max<int64_t>(1, ceil_div(m, step));
  cut.tiles = ceil_div(runs, cut.lanes);
  cut.slices = few ? 1 : std::min(std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, cut.tiles)), steps);
  cut.rows = ceil_div(steps, cut.slices) * step;
  cut.slices = std::max<int64_t>(1, ceil_div(m, cut.rows));
  return cut;
}

}  // namespace dlk::cuda
