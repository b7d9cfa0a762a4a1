// Calls of the losses as a device takes them: checked, described to a kernel, results allocated.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels/loss_params.h"

namespace dlk {

// Loss and gradients of x, weight and bias.
using LossOfLinear = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct ElementwiseLossCall {
  DType dtype;
  at::Reduction::Reduction reduction;
  bool has_var;                           // Gaussian likelihood; otherwise squared error
  int64_t count;                          // the denominator of a mean
  at::Tensor each, grad_input, grad_var;  // undefined where not asked for; `each` without reduction
  at::Tensor operands[3];                 // they hold the memory that `p` points to
  ElementwiseLoss p;                      // without its sums
};

struct CrossEntropyCall {
  DType dtype;
  at::Reduction::Reduction reduction;
  double rows;                                    // the denominator of a mean over class probabilities
  at::Tensor each, grad, grad_target;             // undefined where not asked for; `each` without reduction
  at::Tensor x, probabilities, indices, weights;  // they hold the memory that `p` points to
  CrossEntropy p;                                 // without its sums, weight_sum, and a scale of 1
};

// linear_cross_entropy's call, whose rows come in blocks.
struct LinearCrossEntropyCall {
  at::Reduction::Reduction reduction;
  Shape shape;  // rows, classes, in_features
  DType dtype;
  bool need_x, need_weight, need_bias;        // gradients that are wanted
  std::vector<int64_t> x_sizes, row_sizes;    // of x and of target, as they came
  at::Tensor x, weight, bias;                 // x [rows, in_features]; bias contiguous or undefined
  at::Tensor indices, weights, row_grad;      // they hold the memory that `p` points to; row_grad [rows] or undefined
  at::TensorOptions accumulators, gradients;  // of sums, and of the returned gradients
  CrossEntropy p;                             // of logits [rows, classes] without memory, and a scale of 1
};

}  // namespace dlk
