// The CPU ops of the losses: run the kernels, add up the sums of the slices.
#include <algorithm>
#include <vector>

#include "ops/loss_calls.h"
#include "ops/losses.h"
#include "ops/cpu/device.h"
#include "ops/cpu/losses_host.h"

namespace dlk {
namespace {

LossAndGrads elementwise_loss(const char* op, const at::Tensor& input, const at::Tensor& target, const at::Tensor& var,
                              double eps, double constant, int64_t reduction, bool need_input, bool need_var) {
  const auto call = call_elementwise_loss(op, input, target, var, eps, constant, reduction, need_input, need_var);
  cpu::ElementwiseLoss p{call.p, nullptr};
  std::vector<double> sums(cpu::loss_slices(p));
  std::vector<uint8_t> negative(sums.size());
  p.sums = sums.data(), p.negative = negative.data();

  const cpu::Machine machine = cpu::machine_for(call.dtype, false);
  const cpu::Losses& losses = machine.table(call.dtype).losses;
  // An element of the likelihood has a logarithm and a division; one of the squared error has neither.
  (var.defined() ? losses.gaussian_nll : losses.squared_error)(
      p, cpu::torch_threads(machine.threads_for(call.count * (var.defined() ? 32 : 4))));
  TORCH_CHECK_VALUE(std::count(negative.begin(), negative.end(), 1) == 0, "var has negative entry/entries");
  return {cpu::reduced(call.each, sums, call.reduction, call.count, input.options()), call.grad_input, call.grad_var};
}

}  // namespace

LossAndGrad mse_loss_cpu(const at::Tensor& input, const at::Tensor& target, int64_t reduction, bool need_grad) {
  const auto [loss, grad, _] = elementwise_loss("mse_loss", input, target, {}, 0, 0, reduction, need_grad, false);
  return {loss, grad};
}

LossAndGrads gaussian_nll_loss_cpu(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, bool full,
                                   double eps, int64_t reduction, bool need_input, bool need_var) {
  return elementwise_loss("gaussian_nll_loss", input, target, var, eps, gaussian_constant(full), reduction, need_input,
                          need_var);
}

LossAndGrads cross_entropy_cpu(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, int64_t ignore_index, double label_smoothing, bool need_input,
                               bool need_target) {
  const auto call =
      call_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, need_input, need_target);
  cpu::CrossEntropy p{call.p, call.dtype == DType::f64 ? DType::f64 : DType::f32};
  at::Tensor each = call.each;
  if (each.defined()) each = at::empty(each.sizes(), each.options().dtype(accumulator_type(each)));
  p.loss = each.defined() ? each.data_ptr() : nullptr;
  double denominator = call.rows;
  if (p.target)
    denominator = cpu::checked_denominator(call.indices, call.weights, p.classes, ignore_index, "cross_entropy");
  p.weight_sum = cpu::weight_sum(call.weights, p.classes);
  if (call.reduction == at::Reduction::Mean) p.scale = 1 / denominator;
  std::vector<double> sums(cpu::loss_slices(p));
  p.sums = sums.data();
  const cpu::Machine machine = cpu::machine_for(call.dtype, false);
  if (p.classes > 0)
    machine.table(call.dtype).losses.cross_entropy(p, cpu::threads_for_elements(machine, input.numel()));
  else if (each.defined())
    each.zero_();
  if (each.defined()) each = each.to(input.scalar_type());
  return {cpu::reduced(each, sums, call.reduction, denominator, input.options()), call.grad, call.grad_target};
}

}  // namespace dlk
