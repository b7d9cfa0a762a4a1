// The plan of a linear layer's cross entropy: how its rows are cut in blocks, and how the products of a block are stored.
// Blocks are cut by the shape alone and follow each other, so the bits do not depend on the number of threads.
#pragma once

#include <algorithm>

#include "kernels/params.h"

namespace dlk {

struct BlockPlan {
  int64_t rows;  // of a block; the last one may have fewer
  int64_t blocks;
  bool library;    // CPU: torch's GEMM makes the products of a block, and rounds them
  bool one_layer;  // CUDA: one block, whose backward is that of a layer
  OutputMode dx;   // f16 gradients stay accumulators until backward has applied the incoming gradient
  // Blocks whose dweight is added to one sum. Where there are more, the sums are added to each other.
  int64_t blocks_per_sum;

  int64_t first_row(int64_t block) const { return block * rows; }
  int64_t rows_of(int64_t block, int64_t m) const { return std::min(rows, m - first_row(block)); }
};

// `rows` of equal size, a multiple of `multiple`, at most about `most`.
inline int64_t equal_blocks(int64_t m, int64_t most, int64_t multiple) {
  const int64_t blocks = std::max<int64_t>(1, (m + most - 1) / most);
  return std::max<int64_t>(1, ((m + blocks - 1) / blocks + multiple - 1) / multiple * multiple);
}

}  // namespace dlk
