// The CPU ops of the losses: run the kernels, add up the sums of the slices.
#include <algorithm>
#include <vector>

#include "ops/cpu/device.h"
#include "ops/cpu/losses_host.h"

namespace dlk::cpu {

at::Tensor elementwise_loss(const ElementwiseLossCall& call) {
  ElementwiseLoss p{call.p, nullptr};
  std::vector<double> sums(loss_slices(p));
  std::vector<uint8_t> negative(sums.size());
  p.sums = sums.data(), p.negative = negative.data();

  const Machine machine = machine_for(call.dtype, false);
  const Losses& losses = machine.table(call.dtype).losses;
  // An element of the likelihood has a logarithm and a division; an element of the squared error has neither.
  (call.has_var ? losses.gaussian_nll : losses.squared_error)(
      p, torch_threads(machine.threads_for(call.count * (call.has_var ? 32 : 4))));
  TORCH_CHECK_VALUE(std::count(negative.begin(), negative.end(), 1) == 0, "var has negative entry/entries");
  return reduced(call.each, sums, call.reduction, call.count, call.operands[0].options());
}

at::Tensor cross_entropy(const CrossEntropyCall& call) {
  CrossEntropy p{call.p, call.dtype == DType::f64 ? DType::f64 : DType::f32};
  const at::TensorOptions options = call.x.options();
  at::Tensor each = call.each;
  if (each.defined()) each = new_empty(each.sizes(), options.dtype(accumulator_type(each)));
  p.loss = data_or_null(each);
  double denominator = call.rows;
  if (p.target)
    denominator = checked_denominator(call.indices, call.weights, p.classes, p.ignore_index, "cross_entropy");
  p.weight_sum = weight_sum(call.weights, p.classes);
  if (call.reduction == at::Reduction::Mean) p.scale = 1 / denominator;
  std::vector<double> sums(loss_slices(p));
  p.sums = sums.data();
  const Machine machine = machine_for(call.dtype, false);
  if (p.classes > 0)
    machine.table(call.dtype).losses.cross_entropy(p, threads_for_elements(machine, call.x.numel()));
  else if (each.defined())
    each.zero_();
  if (each.defined()) each = each.to(options.dtype().toScalarType());
  return reduced(each, sums, call.reduction, denominator, options);
}

}  // namespace dlk::cpu
