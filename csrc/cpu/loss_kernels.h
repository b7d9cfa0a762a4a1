// What a CPU kernel set offers for the losses, and the calls it answers (kernels.h has the rest). No torch here.
//
// One call makes the loss and, where asked for, its gradient for an incoming gradient of 1: in accumulators (f32, f64
// for f64), because it is rounded when the incoming one has been applied. binary16 could not even hold 1/count. Sums are cut in slices
// whose size depends on the shape alone; a slice is summed by one thread, and the caller adds the slices in order: the
// same bits on any number of threads.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../params.h"

namespace dlk::cpu {

struct Parallel;

// A sum in f64 that keeps what each addition rounds away (Neumaier, 1974): thousands of terms cost f64 no digits either.
struct ExactSum {
  double sum = 0, lost = 0;

  DLK_HD void add(double term) {
    const double next = sum + term;
    lost += (sum < 0 ? -sum : sum) >= (term < 0 ? -term : term) ? (sum - next) + term : (term - next) + sum;
    sum = next;
  }
  DLK_HD double value() const { return lost == lost ? sum + lost : sum; }  // Inf - Inf was lost where sum is Inf
};

// Elementwise losses over [rows, cols]: squared error (x - t)², Gaussian negative log likelihood
// (ln v + (x - t)²/v)/2 + constant with v = max(var, eps).
struct ElementwiseLoss {
  int64_t rows, cols;
  View input, target, var;  // var: Gaussian only
  double eps, constant;
  double divisor;     // of the gradients: the count for the mean
  void* loss;         // [rows, cols] contiguous, or nullptr
  void* grad_input;   // [rows, cols] contiguous, or nullptr; the target's gradient is its negative
  void* grad_var;     // likewise
  double* sums;       // per slice
  uint8_t* negative;  // per slice: whether var has an entry below 0; Gaussian only
};

constexpr int64_t kLossSlice = 16384;  // elements
DLK_HD int64_t loss_slices(const ElementwiseLoss& p) { return (p.rows * p.cols + kLossSlice - 1) / kLossSlice; }

// In elements, of a tensor seen as [outer, classes, inner].
struct ClassStrides {
  int64_t outer, cls, inner;
};

// Cross entropy of outer × inner rows of logits x: -Σ q_c ln softmax(x)_c, with
//
//   class indices         q = w ⊙ ((1 - s)·onehot + s/classes), 0 for an ignored row     s: smoothing, w: weight
//   class probabilities   q = w ⊙ ((1 - s)·t      + s/classes)
struct CrossEntropy {
  int64_t outer, classes, inner;
  const void* x;
  ClassStrides x_strides;
  const int64_t* target;  // [outer, inner] contiguous, every index checked; nullptr with class probabilities
  int64_t ignore_index;
  const void* soft;  // class probabilities t, or nullptr
  ClassStrides soft_strides;
  const void* weight;  // [classes], f32 (f64 for f64), or nullptr
  double weight_sum;   // over the classes
  double smoothing;
  double scale;          // of the gradients: 1/denominator for the mean
  const void* row_grad;  // [outer, inner], f32 (f64 for f64), that the rows' gradients are multiplied by, or nullptr
  void* loss;            // [outer, inner] contiguous accumulators, or nullptr
  void* grad;            // of x, or nullptr; may lie where x does, if no row begins behind its own logits
  DType grad_dtype;      // of grad: accumulators, or bf16 or f16 rounded
  void* grad_soft;       // of t, accumulators, or nullptr
  ClassStrides grad_strides;
  double* sums;  // per slice
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
