#include "ops/autograd/linear_act.h"

#include "kernels/activation.h"
#include "ops/autograd/derivatives.h"
#include "ops/autograd/function.h"

namespace dlk {
namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, double);
using ForwardBeside = Pair(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, double);

// Only the tensors that the needed gradients read are saved (those of the identity read neither y nor z). The others cost no
// memory and may be changed in place before backward, as in stock torch.
void save(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
          const at::Tensor& saved, const at::Tensor& anchor, int64_t act, double slope) {
  const at::Tensor none;
  ctx->save_for_backward({weight.requires_grad() ? x : none, x.requires_grad() ? with_its_memory(weight) : none,
                          static_cast<Act>(act) == Act::none ? none : saved, anchor});
  ctx->set_materialize_grads(false);
  ctx->save("act", act);
  ctx->save("slope", slope);
  ctx->save("bias", bias.has_value());
}

// The values that `save` stored, and the gradients that backward receives.
struct Saved {
  variable_list tensors;
  at::Tensor x, weight, saved, anchor, g, grad_saved;
  int64_t act;
  double slope;
  std::array<bool, 3> needs;

  Saved(AutogradContext* ctx, const variable_list& grads)
      : tensors(ctx->get_saved_variables()),
        x(tensors[0]),
        weight(tensors[1]),
        saved(tensors[2]),
        anchor(tensors[3]),
        g(grads[0]),
        grad_saved(grads.size() > 1 ? grads[1] : at::Tensor()),
        act(ctx->saved<int64_t>("act")),
        slope(ctx->saved<double>("slope")),
        needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
              ctx->saved<bool>("bias") && ctx->needs_input_grad(2)} {}

  bool in_training() const { return !grad_saved.defined() && is_opaque_backward(g); }
  // The identity's backward reads no saved tensor: g takes its place, a tensor of the same shape.
  const at::Tensor& saved_or_g() const { return saved.defined() ? saved : g; }
};

// Its outputs are y and, where the gradient reads z, z. So a second derivative returns through the Function, and forward
// saves nothing for it. If a mask is saved, the second output is the mask's anchor.
struct LinearAct : Function<LinearAct> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const OptionalTensor& bias, int64_t act, double slope, bool mask) {
    static const auto forward = dispatched<Forward>("dlkernels::_linear_act_forward");
    static const auto forward_z = dispatched<ForwardBeside>("dlkernels::_linear_act_forward_z");
    static const auto forward_mask = dispatched<ForwardBeside>("dlkernels::_linear_act_forward_mask");
    if (!mask && saves_output(static_cast<Act>(act))) {
      at::Tensor y = forward.call(x, weight, bias, act, slope);
      save(ctx, x, weight, bias, y, {}, act, slope);
      return {y};
    }
    auto [y, saved] = (mask ? forward_mask : forward_z).call(x, weight, bias, act, slope);
    const at::Tensor anchor = mask ? aten::empty({0}, x.options()) : at::Tensor();
    save(ctx, x, weight, bias, saved, anchor, act, slope);
    return {y, mask ? anchor : saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using F = Gradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&, int64_t,
                        double, bool, bool, bool);
    static const auto op = dispatched<F>("dlkernels::_linear_act_backward");
    const Saved s(ctx, grads);
    auto [dx, dweight, dbias] =
        s.in_training()
            ? op.call(s.g, present(s.x), present(s.weight), s.saved_or_g(), s.act, s.slope, s.needs[0], s.needs[1],
                      s.needs[2])
            : backward_in_torch({s.g, s.grad_saved, s.x, s.weight, s.saved, s.anchor, s.act, s.slope, s.needs});
    return {dx, dweight, dbias};
  }
};

struct LinearActAutocast : Function<LinearActAutocast> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const OptionalTensor& bias, int64_t act, double slope) {
    static const auto forward = dispatched<Forward>("dlkernels::_linear_act_autocast_forward");
    static const auto forward_z = dispatched<ForwardBeside>("dlkernels::_linear_act_autocast_forward_z");
    ctx->save("x_dtype", static_cast<int64_t>(x.scalar_type()));
    if (saves_output(static_cast<Act>(act))) {
      at::Tensor y = forward.call(x, weight, bias, act, slope);
      save(ctx, x, weight, bias, y, {}, act, slope);
      return {y};
    }
    auto [y, z] = forward_z.call(x, weight, bias, act, slope);
    save(ctx, x, weight, bias, z, {}, act, slope);
    return {y, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using F = Gradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                        at::ScalarType, int64_t, double, bool, bool, bool);
    static const auto op = dispatched<F>("dlkernels::_linear_act_autocast_backward");
    const Saved s(ctx, grads);
    const at::ScalarType x_dtype = static_cast<at::ScalarType>(ctx->saved<int64_t>("x_dtype"));
    if (s.in_training()) {
      auto [dx, dweight, dbias] = op.call(s.g, present(s.x), present(s.weight), s.saved_or_g(), x_dtype, s.act, s.slope,
                                          s.needs[0], s.needs[1], s.needs[2]);
      return {dx, dweight, dbias};
    }
    auto cast = [](const at::Tensor& t, at::ScalarType dtype) { return t.defined() ? t.to(dtype) : t; };
    auto [dx, dweight, dbias] = backward_in_torch({s.g,
                                                   s.grad_saved,
                                                   cast(s.x, at::kBFloat16),
                                                   cast(s.weight, at::kBFloat16),
                                                   s.saved,
                                                   {},
                                                   s.act,
                                                   s.slope,
                                                   s.needs});
    return {cast(dx, x_dtype), cast(dweight, at::kFloat), cast(dbias, at::kFloat)};
  }
};

}  // namespace

at::Tensor linear_act(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                      double slope, bool mask) {
  return LinearAct::apply(x, weight, bias, act, slope, mask)[0];
}

at::Tensor linear_act_autocast(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                               double slope) {
  return LinearActAutocast::apply(x, weight, bias, act, slope)[0];
}

}  // namespace dlk
