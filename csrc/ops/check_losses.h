// The checks of the losses. Like check.h they validate once and return the problem.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/params.h"

namespace dlk {

at::Reduction::Reduction check_reduction(int64_t reduction, const char* op);

// input, target and, where defined, var: floating point tensors of one shape, dtype and device.
DType check_elementwise_loss(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, const char* op);

struct ClassProblem {
  int64_t outer, classes, inner;  // input as [N, C, d1·d2·...]
  bool soft;                      // target holds class probabilities
  double smoothing;
  DType dtype;
};

struct LinearClassProblem {
  Shape shape;  // rows, classes, in_features
  double smoothing;
  DType dtype;
};

// Both check everything except the values of class indices.
LinearClassProblem check_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                              const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                              const std::optional<at::Tensor>& class_weight,
                                              const std::optional<at::Tensor>& grad_loss, double label_smoothing);
ClassProblem check_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                 const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing);

}  // namespace dlk
