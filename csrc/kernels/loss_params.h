// Plain structs that describe one call to a loss kernel, like those of params.h. No torch, no CUDA.
//
// One call makes the loss and, where asked for, its gradient for an incoming gradient of 1. Gradients are accumulators
// (f32, f64 for f64): they are rounded after the incoming gradient has been applied, and binary16 could not even hold
// 1/count. Sums are cut in slices whose size depends on the shape alone, and the slices are added in order, so that the
// bits are the same every time.
#pragma once

#include "kernels/params.h"

namespace dlk {

// An elementwise loss over [rows, cols]: the squared error (x - t)², or the Gaussian negative log likelihood (ln v + (x
// - t)²/v)/2 + constant with v = max(var, eps).
struct ElementwiseLoss {
  int64_t rows, cols;
  View input, target, var;  // x, t and var, [rows, cols]; var for Gaussian only
  double eps, constant;     // Gaussian only
  double divisor;           // of the gradients: the number of elements for the mean
  void* loss;               // [rows, cols] contiguous, or nullptr
  void* grad_input;         // [rows, cols] contiguous, or nullptr; the gradient of the target is its negative
  void* grad_var;           // [rows, cols] contiguous, or nullptr
  double* sums;             // receives the sum of the loss, one part per slice
};

// The strides of a tensor seen as [outer, classes, inner], in elements.
struct ClassStrides {
  int64_t outer, cls, inner;
};

// Cross entropy of outer × inner rows of logits x: -Σ q_c ln softmax(x)_c, with
//
//   class indices         q = w ⊙ ((1 - s)·onehot + s/classes), 0 for an ignored row     s: smoothing, w: weight
//   class probabilities   q = w ⊙ ((1 - s)·t      + s/classes)
struct CrossEntropy {
  int64_t outer, classes, inner;
  const void* x;  // the logits
  ClassStrides x_strides;
  const int64_t* target;  // class indices, [outer, inner] contiguous; nullptr with class probabilities
  int64_t ignore_index;
  const void* soft;  // class probabilities t, or nullptr
  ClassStrides soft_strides;
  const void* weight;  // [classes] accumulators, or nullptr
  double weight_sum;   // of all classes
  double smoothing;
  double scale;          // of the gradients: 1/denominator for the mean
  const void* row_grad;  // [outer, inner] accumulators: factors of the rows' gradients; or nullptr
  void* loss;            // [outer, inner] contiguous, or nullptr
  void* grad;            // of x, or nullptr
  void* grad_soft;       // of t, or nullptr
  ClassStrides grad_strides;
  double* sums;  // receives the sum of the loss, one part per slice
};

// A sum in f64 that keeps what each addition rounds away (Neumaier, 1974). With it, thousands of terms cost no digits,
// even where the terms are f64 themselves.
struct ExactSum {
  double sum = 0, lost = 0;

  DLK_HD void add(double term) {
    const double next = sum + term;
    lost += (sum < 0 ? -sum : sum) >= (term < 0 ? -term : term) ? (sum - next) + term : (term - next) + sum;
    sum = next;
  }
  // An infinite sum stays as it is: `lost` is NaN then.
  DLK_HD double value() const { return sum - sum == 0 ? sum + lost : sum; }
};

}  // namespace dlk
