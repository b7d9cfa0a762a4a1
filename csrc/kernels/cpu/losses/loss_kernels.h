// The interface of a CPU kernel set for the losses of loss_params.h (kernels.h has the rest). No torch here.
//
// A slice is summed by one thread, and the caller adds the slices in order: the same bits on any number of threads.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/loss_params.h"

namespace dlk::cpu {

struct Parallel;

using dlk::ExactSum;

struct ElementwiseLoss : dlk::ElementwiseLoss {
  uint8_t* negative;  // per slice: 1 if var has an entry below 0; Gaussian only
};

constexpr int64_t kLossSlice = 16384;  // elements
DLK_HD int64_t loss_slices(const ElementwiseLoss& p) { return (p.rows * p.cols + kLossSlice - 1) / kLossSlice; }

using dlk::ClassStrides;

// Every class index is checked. `loss` takes accumulators; `grad` may lie where x does, if no row begins behind its own
// logits.
struct CrossEntropy : dlk::CrossEntropy {
  DType grad_dtype;  // of grad: accumulators, or bf16 or f16 rounded
};

// Rows per slice: about 64 thousand logits, in whole registers.
DLK_HD int64_t row_slice(int64_t classes) {
  const int64_t rows = 65536 / (classes > 64 ? classes : 64) / 16 * 16;
  return rows > 16 ? rows : 16;
}
DLK_HD int64_t loss_slices(const CrossEntropy& p) {
  return p.outer * ((p.inner + row_slice(p.classes) - 1) / row_slice(p.classes));
}

// The entry points for one element type.
struct Losses {
  void (*squared_error)(const ElementwiseLoss&, const Parallel&);
  void (*gaussian_nll)(const ElementwiseLoss&, const Parallel&);
  void (*cross_entropy)(const CrossEntropy&, const Parallel&);
};

}  // namespace dlk::cpu
