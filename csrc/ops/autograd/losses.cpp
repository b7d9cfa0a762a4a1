// Forward computes the loss and its gradients for a grad_loss of 1 together. Backward multiplies them by grad_loss. A backward
// that is recorded differentiates torch's formulas (dlkernels/_ops/losses.py).
#include "ops/autograd/losses.h"

#include "ops/autograd/cross_entropy_settings.h"

namespace dlk {

std::tuple<at::Tensor, at::Tensor> call_mse_loss_forward(const at::Tensor& input, const at::Tensor& target,
                                                         int64_t reduction, bool need_grad) {
  using F = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t, bool);
  static const auto op = dispatched<F>("dlkernels::_mse_loss_forward");
  return op.call(input, target, reduction, need_grad);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> call_cross_entropy_forward(
    const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool need_input, bool need_target) {
  using F = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                           int64_t, int64_t, double, bool, bool);
  static const auto op = dispatched<F>("dlkernels::_cross_entropy_forward");
  return op.call(input, target, weight, reduction, ignore_index, label_smoothing, need_input, need_target);
}

namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class T>
void multiply(const at::Tensor& grad, double factor, const at::Tensor& product) {
  const T *from = grad.const_data_ptr<T>(), by = static_cast<T>(factor);
  T* to = product.data_ptr<T>();
  for (int64_t i = 0, n = grad.numel(); i < n; ++i) to[i] = from[i] * by;
}

// `grad` is in float32 or float64. The product is rounded to the dtype of `like`. torch's operator costs 2 µs, so few numbers
// are multiplied here.
at::Tensor times_grad_loss(const at::Tensor& grad, const at::Tensor& grad_loss, const at::Tensor& like) {
  constexpr int64_t few = 4096;
  const bool is_float = grad_loss.scalar_type() == at::kFloat;
  at::Tensor product;
  if (grad.numel() <= few && grad.is_contiguous() && grad_loss.dim() == 0 && is_opaque_backward(grad_loss) &&
      (is_float || grad_loss.scalar_type() == at::kDouble) && is_plain_on_cpu(grad) && is_plain_on_cpu(grad_loss)) {
    const double factor = is_float ? *grad_loss.const_data_ptr<float>() : *grad_loss.const_data_ptr<double>();
    product = new_empty(grad.sizes(), grad.options());
    (grad.scalar_type() == at::kFloat ? multiply<float> : multiply<double>)(grad, factor, product);
  } else {
    product = aten::mul(grad, grad_loss);
  }
  return product.scalar_type() == like.scalar_type() ? product : product.to(like.scalar_type());
}

struct MseLoss : Function<MseLoss> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            int64_t reduction) {
    auto [loss, grad] = call_mse_loss_forward(input, target, reduction, true);
    ctx->save_for_backward({input, target, grad});
    ctx->save("reduction", reduction);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list tensors = ctx->get_saved_variables();
    const at::Tensor &input = tensors[0], &target = tensors[1], &g = grads[0];
    const bool need_input = ctx->needs_input_grad(0), need_target = ctx->needs_input_grad(1);
    if (c10::GradMode::is_enabled()) {
      using F = Pair(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, bool, bool);
      static const auto op = dispatched<F>("dlkernels::_mse_loss_differentiable_backward");
      auto [dinput, dtarget] = op.call(g, input, target, ctx->saved<int64_t>("reduction"), need_input, need_target);
      return {dinput, dtarget};
    }
    const at::Tensor d = times_grad_loss(tensors[2], g, input);
    return {need_input ? d : at::Tensor(), need_target ? aten::neg(d) : at::Tensor()};
  }
};

struct GaussianNllLoss : Function<GaussianNllLoss> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const at::Tensor& var, bool full, double eps, int64_t reduction) {
    using F = Triple(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, double, int64_t, bool, bool);
    static const auto op = dispatched<F>("dlkernels::_gaussian_nll_loss_forward");
    auto [loss, grad, grad_var] = op.call(input, target, var, full, eps, reduction,
                                          input.requires_grad() || target.requires_grad(), var.requires_grad());
    ctx->save_for_backward({input, target, var, grad, grad_var});
    ctx->save("full", full);
    ctx->save("eps", eps);
    ctx->save("reduction", reduction);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list tensors = ctx->get_saved_variables();
    const at::Tensor &input = tensors[0], &target = tensors[1], &var = tensors[2], &g = grads[0];
    const bool need_input = ctx->needs_input_grad(0), need_target = ctx->needs_input_grad(1),
               need_var = ctx->needs_input_grad(2);
    if (c10::GradMode::is_enabled()) {
      using F = Triple(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, double,
                       int64_t, bool, bool, bool);
      static const auto op = dispatched<F>("dlkernels::_gaussian_nll_loss_differentiable_backward");
      auto [dinput, dtarget, dvar] = op.call(g, input, target, var, ctx->saved<bool>("full"), ctx->saved<double>("eps"),
                                             ctx->saved<int64_t>("reduction"), need_input, need_target, need_var);
      return {dinput, dtarget, dvar};
    }
    const at::Tensor d = need_input || need_target ? times_grad_loss(tensors[3], g, input) : at::Tensor();
    return {need_input ? d : at::Tensor(), need_target ? aten::neg(d) : at::Tensor(),
            need_var ? times_grad_loss(tensors[4], g, var) : at::Tensor()};
  }
};

struct CrossEntropyLoss : Function<CrossEntropyLoss> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                            double label_smoothing) {
    auto [loss, grad, grad_target] = call_cross_entropy_forward(
        input, target, weight, reduction, ignore_index, label_smoothing, input.requires_grad(), target.requires_grad());
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), grad, grad_target});
    CrossEntropySettings{reduction, ignore_index, label_smoothing}.save(ctx);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list tensors = ctx->get_saved_variables();
    const at::Tensor &input = tensors[0], &target = tensors[1], &weight = tensors[2];
    const bool need_input = ctx->needs_input_grad(0), need_target = ctx->needs_input_grad(1);
    at::Tensor g = grads[0], dinput, dtarget;
    if (c10::GradMode::is_enabled()) {
      using F = Pair(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, int64_t,
                     double, bool, bool);
      static const auto op = dispatched<F>("dlkernels::_cross_entropy_differentiable_backward");
      const auto [reduction, ignore_index, label_smoothing] = CrossEntropySettings::saved_in(ctx);
      std::tie(dinput, dtarget) =
          op.call(g, input, target, present(weight), reduction, ignore_index, label_smoothing, need_input, need_target);
    } else {
      if (input.dim() > 1 && g.dim() > 0) g = g.unsqueeze(1);  // one value per row, the same for all classes
      if (need_input) dinput = times_grad_loss(tensors[3], g, input);
      if (need_target) dtarget = times_grad_loss(tensors[4], g, target);
    }
    variable_list out = {dinput, dtarget};
    out.resize(3);  // weight has no gradient
    return out;
  }
};

}  // namespace

at::Tensor mse_loss(const at::Tensor& input, const at::Tensor& target, int64_t reduction) {
  return MseLoss::apply(input, target, reduction)[0];
}

at::Tensor gaussian_nll_loss(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, bool full,
                             double eps, int64_t reduction) {
  return GaussianNllLoss::apply(input, target, var, full, eps, reduction)[0];
}

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, int64_t ignore_index, double label_smoothing) {
  return CrossEntropyLoss::apply(input, target, weight, reduction, ignore_index, label_smoothing)[0];
}

}  // namespace dlk
