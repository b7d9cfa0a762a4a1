// Plain structs that describe one call to a loss kernel, as params.h. No torch, no CUDA.
//
// One call makes the loss and, where asked for, its gradient for an incoming gradient of 1: in accumulators (f32, f64
// for f64), because it is rounded when the incoming one has been applied. binary16 could not even hold 1/count. Sums are
// cut in slices whose size depends on the shape alone, and the slices are added up in order: the same bits every time.
#pragma once

#include "kernels/params.h"

namespace dlk {

// Elementwise losses over [rows, cols]: squared error (x - t)², Gaussian negative log likelihood
// (ln v + (x - t)²/v)/2 + constant with v = max(var, eps).
struct ElementwiseLoss {
  int64_t rows, cols;
  View input, target, var;  // var: Gaussian only
  double eps, constant;
  double divisor;    // of the gradients: the count for the mean
  void* loss;        // [rows, cols] contiguous, or nullptr
  void* grad_input;  // [rows, cols] contiguous, or nullptr; the target's gradient is its negative
  void* grad_var;    // likewise
  double* sums;      // per slice
};

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
  const int64_t* target;  // [outer, inner] contiguous; nullptr with class probabilities
  int64_t ignore_index;
  const void* soft;  // class probabilities t, or nullptr
  ClassStrides soft_strides;
  const void* weight;  // [classes], f32 (f64 for f64), or nullptr
  double weight_sum;   // over the classes
  double smoothing;
  double scale;          // of the gradients: 1/denominator for the mean
  const void* row_grad;  // [outer, inner], f32 (f64 for f64), that the rows' gradients are multiplied by, or nullptr
  void* loss;            // [outer, inner] contiguous, or nullptr
  void* grad;            // of x, or nullptr
  void* grad_soft;       // of t, likewise
  ClassStrides grad_strides;
  double* sums;  // per slice
};

// A sum in f64 that also adds up the rounding errors of its additions (Neumaier, 1974): thousands of terms cost no digits.
struct ExactSum {
  double sum = 0, lost = 0;

  DLK_HD void add(double term) {
    const double next = sum + term;
    lost += (sum < 0 ? -sum : sum) >= (term < 0 ? -term : term) ? (sum - next) + term : (term - next) + sum;
    sum = next;
  }
  DLK_HD double value() const {
    return sum - sum == 0 ? sum + lost : sum;
  }  // where sum is infinite, nothing else counts
};

}  // namespace dlk
