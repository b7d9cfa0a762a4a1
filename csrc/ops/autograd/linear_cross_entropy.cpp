// Forward computes the loss and its gradients for a grad_loss of 1 together, and backward multiplies them by grad_loss. Without
// a reduction every row has a grad_loss of its own: backward calls the op again and passes grad_loss to it. A backward that is
// recorded differentiates torch's formula (dlkernels/_ops/linear_cross_entropy.py), which holds all logits.
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul_ops.h>

#include "ops/autograd/cross_entropy_settings.h"
#include "ops/autograd/losses.h"

namespace dlk {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // loss, dx, dweight, dbias

Results forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& target,
                const OptionalTensor& class_weight, const OptionalTensor& grad_loss, int64_t reduction,
                int64_t ignore_index, double label_smoothing, bool need_x, bool need_weight, bool need_bias) {
  using F = Results(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                    const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, double, bool, bool, bool);
  static const auto op = dispatched<F>("dlkernels::_linear_cross_entropy_forward");
  return op.call(x, weight, bias, target, class_weight, grad_loss, reduction, ignore_index, label_smoothing, need_x,
                 need_weight, need_bias);
}

Gradients differentiable_backward(const at::Tensor& g, const at::Tensor& x, const at::Tensor& weight,
                                  const OptionalTensor& bias, const at::Tensor& target,
                                  const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                                  double label_smoothing, bool need_x, bool need_weight, bool need_bias) {
  using F = Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                      const OptionalTensor&, int64_t, int64_t, double, bool, bool, bool);
  static const auto op = dispatched<F>("dlkernels::_linear_cross_entropy_differentiable_backward");
  return op.call(g, x, weight, bias, target, class_weight, reduction, ignore_index, label_smoothing, need_x,
                 need_weight, need_bias);
}

// t, or a copy: autograd cannot save an inference tensor. Where torch's linear saves t too, both raise.
at::Tensor savable(const at::Tensor& t, bool stock_saves) {
  return t.defined() && !stock_saves && t.is_inference() ? t.clone() : t;
}

// It has memory of the CPU, and no mode or transform has to see what happens to it.
bool is_plain_on_cpu(const at::Tensor& t) {
  const c10::DispatchKeySet keys =
      t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU);
}

// d · g in `dtype`. d may be as large as the weight: where we allocate the product, it has huge pages.
at::Tensor product(const at::Tensor& d, const at::Tensor& g, at::ScalarType dtype) {
  if (d.scalar_type() != dtype || g.scalar_type() != dtype || !is_plain_on_cpu(d) || !is_plain_on_cpu(g))
    return aten::mul(d, g).to(dtype);
  at::Tensor out = new_empty(d.sizes(), d.options());
  return at::_ops::mul_out::call(d, g, out);
}

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias, const at::Tensor& target, const OptionalTensor& class_weight,
                            int64_t reduction, int64_t ignore_index, double label_smoothing) {
    const at::Tensor none;
    const bool now = reduction != at::Reduction::None;
    const bool need_x = x.requires_grad(), need_weight = weight.requires_grad();
    auto [loss, dx, dweight, dbias] =
        dlk::forward(x, weight, bias, target, class_weight, std::nullopt, reduction, ignore_index, label_smoothing,
                     now && need_x, now && need_weight, now && bias && bias->requires_grad());
    ctx->save_for_backward({savable(x, need_weight), savable(weight, need_x), savable(bias.value_or(none), false),
                            target, class_weight.value_or(none), dx, dweight, dbias});
    CrossEntropySettings{reduction, ignore_index, label_smoothing}.save(ctx);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list tensors = ctx->get_saved_variables();
    const at::Tensor &x = tensors[0], &weight = tensors[1], &bias = tensors[2], &target = tensors[3],
                     &class_weight = tensors[4], &g = grads[0];
    const auto [reduction, ignore_index, label_smoothing] = CrossEntropySettings::saved_in(ctx);
    const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1);
    const bool need_bias = bias.defined() && ctx->needs_input_grad(2);
    const bool each_row = reduction == at::Reduction::None;
    if (c10::GradMode::is_enabled() || (each_row && !is_opaque_backward(g))) {
      auto [dx, dweight, dbias] =
          differentiable_backward(g, x, weight, present(bias), target, present(class_weight), reduction, ignore_index,
                                  label_smoothing, need_x, need_weight, need_bias);
      return {dx, dweight, dbias, {}, {}};
    }
    variable_list out(tensors.begin() + 5, tensors.end());  // dx, dweight and dbias for a grad_loss of 1
    if (each_row)
      std::tie(std::ignore, out[0], out[1], out[2]) =
          dlk::forward(x, weight, present(bias), target, present(class_weight), g, reduction, ignore_index,
                       label_smoothing, need_x, need_weight, need_bias);
    for (at::Tensor& d : out)
      if (d.defined()) d = each_row ? d.to(x.scalar_type()) : product(d, g, x.scalar_type());
    out.resize(5);  // target and class_weight have no gradient
    return out;
  }
};

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const at::Tensor& target, const OptionalTensor& class_weight, int64_t reduction,
                                int64_t ignore_index, double label_smoothing) {
  return LinearCrossEntropy::apply(x, weight, bias, target, class_weight, reduction, ignore_index, label_smoothing)[0];
}

}  // namespace dlk
