// A chain of layers, a loss of its output, and the gradients of the parameters, as one op.
#pragma once

#include "ops/mlp.h"

namespace dlk {

enum class LossKind : int64_t { mse, cross_entropy };

// The loss, the output and the gradients.
using LossOfMlp = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// The loss and the output of mlp(x, weights, biases) and the gradients among [dweight_0 ..., dbias_0 ...] that `needs`, in the same order,
// asks for: those of the loss itself, which is a mean or a sum. class_weight, ignore_index and label_smoothing are of
// cross_entropy. Nothing is recorded.
// Of an ensemble (ops/mlp.h) each member has its own loss, [E], and the gradients are those of their sum. x [M, K] and a target
// of one member are every member's.
LossOfMlp mlp_loss(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
                   double slope, const at::Tensor& target, int64_t kind, const OptionalTensor& class_weight,
                   int64_t reduction, int64_t ignore_index, double label_smoothing, at::IntArrayRef needs);

// The same through the dispatcher: profilers see it.
LossOfMlp call_mlp_loss(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                        at::IntArrayRef acts, double slope, const at::Tensor& target, int64_t kind,
                        const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                        double label_smoothing, at::IntArrayRef needs);

// The same of a chain that is no ensemble, on the CPU, where `user` gets the gradients of each layer as soon as they are there.
// They are returned only if it keeps them. With `only_finite` there are none if the loss is NaN or infinite.
LossOfMlp mlp_loss_for(const GradientUser& user, bool only_finite, const at::Tensor& x, at::TensorList weights,
                       const OptionalTensors& biases, at::IntArrayRef acts, double slope, const at::Tensor& target,
                       int64_t kind, const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, at::IntArrayRef needs);

// Return true if the loss is finite. The losses of an ensemble are added up for this.
bool is_finite(const at::Tensor& loss);

}  // namespace dlk
