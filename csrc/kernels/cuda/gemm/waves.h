// Which of two tiles a product takes: the one with which the busiest SM is done first.
#pragma once

#include "kernels/cuda/launch.cuh"

namespace dlk::cuda {

// Return whether `large` tiles take less time than `small` ones, where a large tile has the area of `ratio` small ones. A
// tile costs its area, and a small one a quarter more, since it loads more for each product. (Counted, not measured.)
inline bool takes_large(int64_t large, int64_t small, int ratio, int64_t processors) {
  const int64_t most = std::max<int64_t>(1, processors);
  return ceil_div(large, most) * ratio * 4 <= ceil_div(small, most) * 5;
}

}  // namespace dlk::cuda
