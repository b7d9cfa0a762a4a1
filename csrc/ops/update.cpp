#include "ops/update.h"

#include <ATen/ops/_foreach_add_ops.h>
#include <ATen/ops/_fused_adam_ops.h>
#include <ATen/ops/_fused_adamw_ops.h>
#include <ATen/ops/_fused_sgd_ops.h>

#include "ops/tensors.h"

namespace dlk {
namespace {

// Each member's part of these tensors, as torch's kernels would get it from the member alone.
std::vector<at::Tensor> split(at::TensorList tensors, int64_t members) {
  std::vector<at::Tensor> parts;
  for (const at::Tensor& t : tensors)
    for (int64_t e = 0; e < members; ++e) parts.push_back(member_of(t, e));
  return parts;
}

OptimizerGroup split(const OptimizerGroup& g) {
  OptimizerGroup parts = g;
  parts.parameters = split(g.parameters, g.members), parts.means = split(g.means, g.members);
  parts.squares = split(g.squares, g.members), parts.max_squares = split(g.max_squares, g.members);
  parts.steps.clear();
  for (const at::Tensor& step : g.steps) parts.steps.insert(parts.steps.end(), g.members, step);
  parts.members = 1;
  return parts;
}

void count_steps(const std::vector<at::Tensor>& steps) {
  for (const at::Tensor& step : steps) {
    if (!step.is_cpu()) return at::_ops::_foreach_add__Scalar::call(steps, 1);
    if (step.scalar_type() == at::kDouble)
      *step.mutable_data_ptr<double>() += 1;
    else
      *step.mutable_data_ptr<float>() += 1;
    step.unsafeGetTensorImpl()->bump_version();
  }
}

void update_at_rate_on_gpu(const OptimizerGroup& g, at::TensorList grads) {
  const at::Tensor& lr = g.lr_on_gpu;
  switch (g.rule) {
    case cpu::UpdateRule::adam:
      return at::_ops::_fused_adam__tensor_lr::call(g.parameters, grads, g.means, g.squares, g.max_squares, g.steps, lr,
                                                    g.beta1, g.beta2, g.weight_decay, g.eps, g.amsgrad, g.maximize, {},
                                                    {});
    case cpu::UpdateRule::adamw:
      return at::_ops::_fused_adamw__tensor_lr::call(g.parameters, grads, g.means, g.squares, g.max_squares, g.steps,
                                                     lr, g.beta1, g.beta2, g.weight_decay, g.eps, g.amsgrad, g.maximize,
                                                     {}, {});
    case cpu::UpdateRule::sgd:
      return at::_ops::_fused_sgd__tensor_lr::call(g.parameters, grads, g.means, g.weight_decay, g.beta1, lr,
                                                   g.dampening, g.nesterov, g.maximize, /*is_first_step=*/false, {},
                                                   {});
  }
}

}  // namespace

void update_by_torch(const OptimizerGroup& g, at::TensorList grads) {
  if (g.lr_on_gpu.defined()) return update_at_rate_on_gpu(g, grads);
  switch (g.rule) {
    case cpu::UpdateRule::adam:
      return at::_ops::_fused_adam_::call(g.parameters, grads, g.means, g.squares, g.max_squares, g.steps, g.lr,
                                          g.beta1, g.beta2, g.weight_decay, g.eps, g.amsgrad, g.maximize, {}, {});
    case cpu::UpdateRule::adamw:
      return at::_ops::_fused_adamw_::call(g.parameters, grads, g.means, g.squares, g.max_squares, g.steps, g.lr,
                                           g.beta1, g.beta2, g.weight_decay, g.eps, g.amsgrad, g.maximize, {}, {});
    case cpu::UpdateRule::sgd:
      return at::_ops::_fused_sgd_::call(g.parameters, grads, g.means, g.weight_decay, g.beta1, g.lr, g.dampening,
                                         g.nesterov, g.maximize, /*is_first_step=*/false, {}, {});
  }
}

// Modes that see torch's operators see torch's update too.
bool updates_by_kernel(const OptimizerGroup& g) {
  const at::Tensor& first = g.parameters[0];
  return first.is_cpu() && !has_mode() && cpu::updates_like_torch(first.scalar_type(), g.rule);
}

OptimizerGroup part_of(const OptimizerGroup& g, at::ArrayRef<size_t> places) {
  OptimizerGroup part = {g.rule,         g.amsgrad, g.maximize, g.nesterov,  g.lr,
                         g.weight_decay, g.beta2,   g.eps,      g.dampening, g.beta1};
  part.members = g.members;
  auto pick = [&](const std::vector<at::Tensor>& from, std::vector<at::Tensor>& to) {
    for (const size_t i : places)
      if (i < from.size()) to.push_back(from[i]);
  };
  pick(g.parameters, part.parameters), pick(g.means, part.means), pick(g.squares, part.squares);
  pick(g.max_squares, part.max_squares), pick(g.steps, part.steps);
  return part;
}

void update(const OptimizerGroup& g, at::TensorList grads) {
  if (g.parameters.empty()) return;
  count_steps(g.steps);
  if (!updates_by_kernel(g) || !cpu::update_by_kernel(g, grads))
    g.members > 1 ? update_by_torch(split(g), split(grads, g.members)) : update_by_torch(g, grads);
  // torch's fused kernels leave the versions as they are.
  for (const at::Tensor& p : g.parameters) p.unsafeGetTensorImpl()->bump_version();
}

}  // namespace dlk
