// The loss kernels that a CPU kernel set offers, and their arguments; kernels.h has the other kernels. No torch here.
//
// One thread sums a slice, and csrc/ops adds the slices in order, so that the bits are the same on any number of
// threads.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/loss_params.h"

namespace dlk::cpu {

struct Parallel;

using dlk::ExactSum;

// `sums` holds loss_slices() parts.
struct ElementwiseLoss : dlk::ElementwiseLoss {
  uint8_t* negative;  // [loss_slices()]: 1 where var has an element below 0 in the slice; Gaussian only
};

constexpr int64_t kLossSlice = 16384;  // elements of a slice
DLK_HD int64_t loss_slices(const ElementwiseLoss& p) { return (p.rows * p.cols + kLossSlice - 1) / kLossSlice; }

using dlk::ClassStrides;

// csrc/ops has checked every class index. `loss` receives accumulators, `sums` holds loss_slices() parts. grad may be
// the memory of x if no row of grad begins behind its own logits.
struct CrossEntropy : dlk::CrossEntropy {
  DType grad_dtype;  // of grad: bf16 and f16 are rounded, others are accumulators
};

// Return the rows of a slice: about 64 thousand logits, and whole registers.
DLK_HD int64_t row_slice(int64_t classes) {
  const int64_t rows = 65536 / (classes > 64 ? classes : 64) / 16 * 16;
  return rows > 16 ? rows : 16;
}
DLK_HD int64_t loss_slices(const CrossEntropy& p) {
  return p.outer * ((p.inner + row_slice(p.classes) - 1) / row_slice(p.classes));
}

// The loss kernels for one element type.
struct Losses {
  void (*squared_error)(const ElementwiseLoss&, const Parallel&);
  void (*gaussian_nll)(const ElementwiseLoss&, const Parallel&);
  void (*cross_entropy)(const CrossEntropy&, const Parallel&);
};

}  // namespace dlk::cpu
