// Calls of the losses as the CPU and the CUDA op take them: checked, described to a kernel, results allocated.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/loss_params.h"

namespace dlk {

struct ElementwiseLossCall {
  DType dtype;
  at::Reduction::Reduction reduction;
  int64_t count;                          // the denominator of a mean
  at::Tensor each, grad_input, grad_var;  // undefined where not asked for; `each` without reduction
  at::Tensor operands[3];                 // they hold the memory that `p` points to
  ElementwiseLoss p;                      // without its sums
};

// var undefined: squared error.
ElementwiseLossCall call_elementwise_loss(const char* op, const at::Tensor& input, const at::Tensor& target,
                                          const at::Tensor& var, double eps, double constant, int64_t reduction,
                                          bool need_input, bool need_var);
double gaussian_constant(bool full);  // ln(2π)/2, or nothing

struct CrossEntropyCall {
  DType dtype;
  at::Reduction::Reduction reduction;
  double rows;                                    // the denominator of a mean over class probabilities
  at::Tensor each, grad, grad_target;             // undefined where not asked for; `each` without reduction
  at::Tensor x, probabilities, indices, weights;  // they hold the memory that `p` points to
  CrossEntropy p;                                 // without its sums, weight_sum, and a scale of 1
};

// Checks everything except the values of class indices.
CrossEntropyCall call_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                    const std::optional<at::Tensor>& weight, int64_t reduction, int64_t ignore_index,
                                    double label_smoothing, bool need_input, bool need_target);

// linear_cross_entropy's call, whose rows come in blocks.
struct LinearCrossEntropyCall {
  at::Reduction::Reduction reduction;
  Shape shape;  // rows, classes, in_features
  DType dtype;
  at::Tensor x, bias;  // [rows, in_features]; contiguous or undefined
  at::Tensor indices, weights,
      row_grad;  // they hold the memory that `p` points to; row_grad [rows]; undefined where not given
  at::TensorOptions accumulators, gradients;  // of sums, and of the returned gradients
  CrossEntropy p;                             // of logits [rows, classes] that lie in no memory yet, and a scale of 1
};

LinearCrossEntropyCall call_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                                 const std::optional<at::Tensor>& class_weight,
                                                 const std::optional<at::Tensor>& grad_loss, int64_t reduction,
                                                 int64_t ignore_index, double label_smoothing);

}  // namespace dlk
