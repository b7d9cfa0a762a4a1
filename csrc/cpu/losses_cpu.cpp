// The CPU ops of the losses: check, describe the call to the kernels, add up what the slices give.
#include "../losses.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../check.h"
#include "../check_losses.h"
#include "host.h"
#include "losses_host.h"

namespace dlk {
namespace {

using at::Reduction::Reduction;

void* data_or_null(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

at::TensorOptions grad_options(const at::Tensor& t) { return t.options().dtype(cpu::accumulator_type(t)); }

// ---- elementwise ----------------------------------------------------------------------------------------------------

// How elementwise operands are walked through and how the results lie. Operands that fill memory alike are one run and
// the results lie as they do; others are read by rows, and the results are contiguous.
struct Walk {
  int64_t rows, cols;
  bool flat;
  std::vector<int64_t> strides;  // of the results; empty: contiguous

  explicit Walk(std::initializer_list<at::Tensor> operands) {
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
    return strides.empty() ? at::empty(like.sizes(), options) : at::empty_strided(like.sizes(), strides, options);
  }
};

LossAndGrads elementwise_loss(const char* op, const at::Tensor& input, const at::Tensor& target, const at::Tensor& var,
                              double eps, double constant, int64_t reduction_code, bool need_input, bool need_var) {
  const Reduction reduction = check_reduction(reduction_code, op);
  const DType dtype = check_elementwise_loss(input, target, var, op);
  const Walk walk({input, target, var});
  const int64_t count = input.numel();
  const at::Tensor each = walk.result(reduction == at::Reduction::None, input, input.options());
  const at::Tensor grad_input = walk.result(need_input, input, grad_options(input));
  const at::Tensor grad_var = walk.result(need_var, input, grad_options(input));

  at::Tensor kept[3];
  cpu::ElementwiseLoss p{};
  p.rows = walk.rows, p.cols = walk.cols;
  p.input = walk.view(input, kept[0]);
  p.target = walk.view(target, kept[1]);
  p.var = walk.view(var, kept[2]);
  p.eps = eps, p.constant = constant;
  p.divisor = reduction == at::Reduction::Mean ? count : 1;
  p.loss = data_or_null(each);
  p.grad_input = data_or_null(grad_input);
  p.grad_var = data_or_null(grad_var);
  std::vector<double> sums(cpu::loss_slices(p));
  std::vector<uint8_t> negative(sums.size());
  p.sums = sums.data(), p.negative = negative.data();

  const cpu::Losses& losses = cpu::engine(dtype).losses;
  (var.defined() ? losses.gaussian_nll : losses.squared_error)(
      p, cpu::parallel_for_work(count * (var.defined() ? 32 : 4)));
  TORCH_CHECK_VALUE(std::count(negative.begin(), negative.end(), 1) == 0, "var has negative entry/entries");
  return {cpu::reduced(each, sums, reduction, count, input.options()), grad_input, grad_var};
}

// ---- cross entropy --------------------------------------------------------------------------------------------------

// [N, C, d1, ...] as [outer, classes, inner]. Without d's the rows are `inner`, so that neighbours are worked on together.
cpu::ClassStrides class_strides(const at::Tensor& t) {  // t is [N, C, d1·d2·...]
  if (t.size(2) == 1) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace

LossAndGrad mse_loss_cpu(const at::Tensor& input, const at::Tensor& target, int64_t reduction, bool need_grad) {
  const auto [loss, grad, _] = elementwise_loss("mse_loss", input, target, {}, 0, 0, reduction, need_grad, false);
  return {loss, grad};
}

LossAndGrads gaussian_nll_loss_cpu(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, bool full,
                                   double eps, int64_t reduction, bool need_input, bool need_var) {
  const double constant = full ? 0.5 * std::log(2 * M_PI) : 0.0;
  return elementwise_loss("gaussian_nll_loss", input, target, var, eps, constant, reduction, need_input, need_var);
}

LossAndGrads cross_entropy_cpu(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction_code, int64_t ignore_index, double label_smoothing, bool need_input,
                               bool need_target) {
  const Reduction reduction = check_reduction(reduction_code, "cross_entropy");
  const auto [outer, classes, inner, soft, smoothing, dtype] =
      check_cross_entropy(input, target, weight, ignore_index, label_smoothing);
  const at::Tensor x = input.reshape({outer, classes, inner});
  const at::Tensor probabilities = soft ? target.reshape({outer, classes, inner}) : at::Tensor();
  const at::Tensor indices = soft ? at::Tensor() : target.to(at::kLong).contiguous();
  const at::Tensor weights = weight ? weight->to(cpu::accumulator_type(input)).contiguous() : at::Tensor();
  double denominator = input.numel() ? outer * inner : 0;
  if (!soft) denominator = cpu::checked_denominator(indices, weights, classes, ignore_index, "cross_entropy");

  std::vector<int64_t> row_sizes = input.sizes().vec();
  row_sizes.erase(row_sizes.begin() + (input.dim() > 1));
  at::Tensor each, grad, grad_target;
  if (reduction == at::Reduction::None) each = at::empty(row_sizes, grad_options(input));
  if (need_input) grad = at::empty(input.sizes(), grad_options(input));
  if (need_target && soft) grad_target = at::empty(input.sizes(), grad_options(input));

  cpu::CrossEntropy p{};
  const bool flat = inner == 1;
  p.outer = flat ? 1 : outer;
  p.classes = classes;
  p.inner = flat ? outer : inner;
  p.x = x.const_data_ptr();
  p.x_strides = class_strides(x);
  p.grad_strides = flat ? cpu::ClassStrides{0, 1, classes} : cpu::ClassStrides{classes * inner, inner, 1};
  if (soft) {
    p.soft = probabilities.const_data_ptr();
    p.soft_strides = class_strides(probabilities);
  } else {
    p.target = indices.const_data_ptr<int64_t>();
  }
  p.ignore_index = ignore_index;
  p.weight = weights.defined() ? weights.const_data_ptr() : nullptr;
  p.weight_sum = cpu::weight_sum(weights, classes);
  p.smoothing = smoothing;
  p.scale = reduction == at::Reduction::Mean ? 1 / denominator : 1;
  p.loss = data_or_null(each);
  p.grad = data_or_null(grad);
  p.grad_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  p.grad_soft = data_or_null(grad_target);
  std::vector<double> sums(cpu::loss_slices(p));
  p.sums = sums.data();
  if (classes > 0)
    cpu::engine(dtype).losses.cross_entropy(p, cpu::parallel_for_work(input.numel() * 16));
  else if (each.defined())
    each.zero_();
  if (each.defined()) each = each.to(input.scalar_type());
  return {cpu::reduced(each, sums, reduction, denominator, input.options()), grad, grad_target};
}

}  // namespace dlk
