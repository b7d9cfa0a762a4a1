// The ops of the losses: check, describe, allocate, and let the device run.
#include "ops/losses.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/check.h"
#include "ops/check_losses.h"
#include "ops/loss_calls.h"
#include "ops/tensors.h"

namespace dlk {
namespace {

at::TensorOptions grad_options(const at::Tensor& t) { return t.options().dtype(accumulator_type(t)); }

// How elementwise operands are walked through and how the results lie. Operands that fill memory alike are one run and
// the results lie as they do; others are read by rows, and the results are contiguous.
struct ElementOrder {
  int64_t rows, cols;
  bool flat;
  std::vector<int64_t> strides;  // of the results; empty: contiguous

  explicit ElementOrder(std::initializer_list<at::Tensor> operands) {
    const at::Tensor& input = *operands.begin();
    auto all = [&](auto&& f) {
      return std::all_of(operands.begin(), operands.end(), [&](const at::Tensor& t) { return !t.defined() || f(t); });
    };
    flat = all([](const at::Tensor& t) { return t.is_contiguous(); });
    if (!flat && input.is_non_overlapping_and_dense()) {
      flat = all([&](const at::Tensor& t) { return t.strides() == input.strides(); });
      if (flat) strides = input.strides().vec();
    }
    cols = flat ? input.numel() : input.size(-1);
    rows = cols ? input.numel() / cols : 0;
  }
  // `kept` holds what the view points into.
  View view(const at::Tensor& t, at::Tensor& kept) const {
    if (!t.defined()) return {};
    kept = flat ? t : as_rows(t);
    return flat ? View{t.const_data_ptr(), cols, 1} : view_of(kept);
  }
  at::Tensor result(bool wanted, const at::Tensor& like, const at::TensorOptions& options) const {
    if (!wanted) return {};
    return strides.empty() ? new_empty(like.sizes(), options) : aten::empty_strided(like.sizes(), strides, options);
  }
};

// [N, C, d1, ...] as [outer, classes, inner]. Without d's the rows are `inner`, so that neighbours are worked on together.
ClassStrides class_strides(const at::Tensor& t) {  // t is [N, C] or [N, C, d1·d2·...]
  if (t.dim() == 2 || t.size(2) == 1) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// var undefined: squared error.
LossAndGrads elementwise_loss(const Device& device, const char* op, const at::Tensor& input, const at::Tensor& target,
                              const at::Tensor& var, double eps, double constant, int64_t reduction, bool need_input,
                              bool need_var) {
  ElementwiseLossCall call{};
  call.reduction = check_reduction(reduction, op);
  call.dtype = check_elementwise_loss(input, target, var, op);
  call.has_var = var.defined();
  const c10::OptionalDeviceGuard guard(guarded_device(input));
  const ElementOrder order({input, target, var});
  call.count = input.numel();
  call.each = order.result(call.reduction == at::Reduction::None, input, input.options());
  call.grad_input = order.result(need_input, input, grad_options(input));
  call.grad_var = order.result(need_var, input, grad_options(input));

  ElementwiseLoss& p = call.p;
  p.rows = order.rows, p.cols = order.cols;
  p.input = order.view(input, call.operands[0]);
  p.target = order.view(target, call.operands[1]);
  p.var = order.view(var, call.operands[2]);
  p.eps = eps, p.constant = constant;
  p.divisor = call.reduction == at::Reduction::Mean ? call.count : 1;
  p.loss = data_or_null(call.each);
  p.grad_input = data_or_null(call.grad_input);
  p.grad_var = data_or_null(call.grad_var);
  return {device.elementwise_loss(call), call.grad_input, call.grad_var};
}

}  // namespace

LossAndGrad mse_loss_forward(const Device& device, const at::Tensor& input, const at::Tensor& target, int64_t reduction,
                             bool need_grad) {
  const auto [loss, grad, _] =
      elementwise_loss(device, "mse_loss", input, target, {}, 0, 0, reduction, need_grad, false);
  return {loss, grad};
}

LossAndGrads gaussian_nll_loss_forward(const Device& device, const at::Tensor& input, const at::Tensor& target,
                                       const at::Tensor& var, bool full, double eps, int64_t reduction, bool need_input,
                                       bool need_var) {
  const double constant = full ? 0.5 * std::log(2 * M_PI) : 0.0;
  return elementwise_loss(device, "gaussian_nll_loss", input, target, var, eps, constant, reduction, need_input,
                          need_var);
}

LossAndGrads cross_entropy_forward(const Device& device, const at::Tensor& input, const at::Tensor& target,
                                   const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                   double label_smoothing, bool need_input, bool need_target) {
  CrossEntropyCall call{};
  call.reduction = check_reduction(reduction, "cross_entropy");
  const auto [outer, classes, inner, soft, smoothing, dtype] =
      check_cross_entropy(input, target, weight, ignore_index, label_smoothing);
  const c10::OptionalDeviceGuard guard(guarded_device(input));
  call.dtype = dtype;
  call.rows = input.numel() ? outer * inner : 0;
  const auto by_class = [&](const at::Tensor& t) { return t.dim() == 2 ? t : t.reshape({outer, classes, inner}); };
  call.x = by_class(input);
  if (soft) call.probabilities = by_class(target);
  if (!soft) call.indices = (target.scalar_type() == at::kLong ? target : target.to(at::kLong)).contiguous();
  if (weight) call.weights = weight->to(accumulator_type(input)).contiguous();

  std::vector<int64_t> row_sizes = input.sizes().vec();
  row_sizes.erase(row_sizes.begin() + (input.dim() > 1));
  if (call.reduction == at::Reduction::None) call.each = new_empty(row_sizes, input.options());
  if (need_input) call.grad = new_empty(input.sizes(), grad_options(input));
  if (need_target && soft) call.grad_target = new_empty(input.sizes(), grad_options(input));

  CrossEntropy& p = call.p;
  const bool flat = inner == 1;
  p.outer = flat ? 1 : outer;
  p.classes = classes;
  p.inner = flat ? outer : inner;
  p.x = call.x.const_data_ptr();
  p.x_strides = class_strides(call.x);
  p.grad_strides = flat ? ClassStrides{0, 1, classes} : ClassStrides{classes * inner, inner, 1};
  if (soft) {
    p.soft = call.probabilities.const_data_ptr();
    p.soft_strides = class_strides(call.probabilities);
  } else {
    p.target = call.indices.const_data_ptr<int64_t>();
  }
  p.ignore_index = ignore_index;
  p.weight = weight ? call.weights.const_data_ptr() : nullptr;
  p.smoothing = smoothing;
  p.scale = 1;
  p.loss = data_or_null(call.each);
  p.grad = data_or_null(call.grad);
  p.grad_soft = data_or_null(call.grad_target);
  return {device.cross_entropy(call), call.grad, call.grad_target};
}

LossOfLinear linear_cross_entropy_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight,
                                          const OptionalTensor& bias, const at::Tensor& target,
                                          const OptionalTensor& class_weight, const OptionalTensor& grad_loss,
                                          int64_t reduction, int64_t ignore_index, double label_smoothing, bool need_x,
                                          bool need_weight, bool need_bias) {
  LinearCrossEntropyCall call{};
  call.reduction = check_reduction(reduction, "linear_cross_entropy");
  const LinearClassProblem problem =
      check_linear_cross_entropy(x, weight, bias, target, class_weight, grad_loss, label_smoothing);
  const c10::OptionalDeviceGuard guard(guarded_device(x));
  call.shape = problem.shape;
  call.dtype = problem.dtype;
  call.need_x = need_x, call.need_weight = need_weight, call.need_bias = need_bias;
  call.x_sizes = x.sizes().vec(), call.row_sizes = target.sizes().vec();
  call.weight = weight;
  const at::ScalarType acc = accumulator_type(x);
  call.x = as_rows(x);
  call.indices = target.to(at::kLong).contiguous();
  if (bias) call.bias = bias->contiguous();
  if (class_weight) call.weights = class_weight->to(acc).contiguous();
  if (grad_loss) call.row_grad = grad_loss->to(acc).contiguous().view({problem.shape.m});
  call.accumulators = x.options().dtype(acc);
  // binary16 holds no gradient before the incoming one is applied
  call.gradients = problem.dtype == DType::f16 ? call.accumulators : x.options();

  CrossEntropy& p = call.p;
  p.outer = 1, p.classes = problem.shape.n, p.inner = problem.shape.m;
  p.x_strides = p.grad_strides = {0, 1, problem.shape.n};
  p.target = call.indices.const_data_ptr<int64_t>();
  p.ignore_index = ignore_index;
  p.weight = class_weight ? call.weights.const_data_ptr() : nullptr;
  p.row_grad = grad_loss ? call.row_grad.const_data_ptr() : nullptr;
  p.smoothing = problem.smoothing;
  p.scale = 1;
  return device.linear_cross_entropy(call);
}

}  // namespace dlk
