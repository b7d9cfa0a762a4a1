#include "ops/autograd/derivatives.h"

#include <cmath>
#include <vector>

#include "kernels/activation.h"
#include "ops/autograd/function.h"
#include "ops/check.h"
#include "ops/device.h"

namespace dlk {
namespace {

// ---- the formulas in torch's operators -----------------------------------------------------------------------------

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kCubic = 0.044715;  // of gelu_tanh

// 0 in place of less than `limit` times the smallest normal number: products of subnormal numbers are slow. Those of f16 are
// made in f32, where they are normal.
at::Tensor flushed(const at::Tensor& t, double limit) {
  if (t.scalar_type() == at::kHalf) return t;
  return aten::threshold(t, limit * (t.scalar_type() == at::kDouble ? 0x1p-1022 : 0x1p-126));
}

at::Tensor normal_pdf(const at::Tensor& z) { return flushed(z.mul(-0.5).mul(z).exp(), 64).mul(kInvSqrt2Pi); }
at::Tensor normal_cdf(const at::Tensor& z) {
  return flushed(z.mul(-kSqrtHalf).erfc(), 4).mul(0.5);  // 1 + erf would cancel in the left tail
}

// c[0] + c[1] x + ...
at::Tensor polynomial(const at::Tensor& x, const std::vector<double>& c) {
  at::Tensor sum = x.mul(c.back());
  for (size_t i = c.size() - 1; i-- > 1;) sum = sum.add(c[i]).mul(x);
  return sum.add(c[0]);
}

// The derivatives of order n >= 2 of zΦ(z) are Q_n(z)·φ(z), with Q_2 = 2 - z² and Q_(n+1) = Q_n' - z Q_n.
at::Tensor gelu_derivative(const at::Tensor& z, int64_t order) {
  if (order == 1) return normal_cdf(z).add(z.mul(normal_pdf(z)));
  std::vector<double> q = {2, 0, -1};
  for (; order > 2; --order) {
    std::vector<double> next(q.size() + 1, 0);
    for (size_t i = 0; i < q.size(); ++i) next[i + 1] -= q[i];
    for (size_t i = 1; i < q.size(); ++i) next[i - 1] += i * q[i];
    q = next;
  }
  return polynomial(z, q).mul(normal_pdf(z));
}

// The derivatives of order n of zσ(z) are zσ⁽ⁿ⁾ + nσ⁽ⁿ⁻¹⁾. With s = σ(z), σ⁽ⁿ⁾ = s(1 - s)·R_n(s) from order 1 on, where
// R_1 = 1 and R_(n+1) = (s(1 - s)·R_n)'.
at::Tensor silu_derivative(const at::Tensor& z, int64_t order) {
  const at::Tensor s = z.sigmoid(), rest = s.mul(-1).add(1);
  if (order == 1) return s.mul(z.mul(rest).add(1));
  std::vector<double> r = {1}, before;
  for (int64_t n = 1; n < order; ++n) {
    before = r;
    std::vector<double> product(r.size() + 2, 0);  // s(1 - s)·R_n
    for (size_t i = 0; i < r.size(); ++i) product[i + 1] += r[i], product[i + 2] -= r[i];
    r.assign(product.size() - 1, 0);
    for (size_t i = 1; i < product.size(); ++i) r[i - 1] = i * product[i];
  }
  const at::Tensor of_before = before.size() == 1 ? z.mul(polynomial(s, r)).add(static_cast<double>(order))
                                                  : z.mul(polynomial(s, r)).add(polynomial(s, before).mul(order));
  return s.mul(rest).mul(of_before);
}

// The second derivative of z/2·(1 + tanh u), u = sqrt(2/π)·(z + 0.044715 z³): (1 - tanh² u)·(u' + z/2·(u'' - 2 tanh u·u'²)).
at::Tensor gelu_tanh_second_derivative(const at::Tensor& z) {
  const at::Tensor square = z.mul(z);
  const at::Tensor t = square.mul(kCubic).add(1).mul(z).mul(kSqrt2OverPi).tanh();
  const at::Tensor du = square.mul(3 * kCubic).add(1).mul(kSqrt2OverPi), ddu = z.mul(6 * kCubic * kSqrt2OverPi);
  return t.mul(t).mul(-1).add(1).mul(du.add(z.mul(0.5).mul(ddu.sub(t.mul(2).mul(du).mul(du)))));
}

// Most activations have one operator of torch for order 1, which has derivatives of every order, so that higher ones are asked
// for only where a kernel makes those below: order 3 of tanh and sigmoid, any of gelu and silu. torch cannot differentiate its
// operator of silu, and that of gelu cancels in the left tail.
at::Tensor in_torch(const at::Tensor& t, const at::Tensor& s, Act act, double slope, int64_t order) {
  if (act == Act::gelu) return t.mul(gelu_derivative(s, order));
  if (act == Act::silu) return t.mul(silu_derivative(s, order));
  const bool by_kernel = derivative_orders(act) > 0;
  TORCH_CHECK_VALUE(order <= (by_kernel ? 3 : 2),
                    "act_derivative: expected order 1 or 2, of tanh and sigmoid up to 3, or gelu or silu; got ", order);
  if (order == 3) return t.mul(-2);
  if (order == 2) {
    switch (act) {
      case Act::relu2: return aten::threshold_backward(t.mul(2), s);
      case Act::gelu_tanh: return t.mul(gelu_tanh_second_derivative(s));
      case Act::tanh: return t.mul(s).mul(-2);
      case Act::sigmoid: return t.mul(s.mul(-2).add(1));
      default: return aten::zeros_like(t);  // a gradient of zeros is a tensor, as in torch
    }
  }
  // A NaN in s lets the gradient of relu through. As in torch the gradient is selected: infinity times 0 would be NaN.
  switch (act) {
    case Act::relu: return aten::threshold_backward(t, s);
    case Act::leaky_relu: return aten::leaky_relu_backward(t, s, slope);
    case Act::relu2: return aten::threshold_backward(t.mul(s.relu().mul(2)), s);
    case Act::gelu_tanh: return aten::gelu_tanh_backward(t, s);
    case Act::tanh: return aten::tanh_backward(t, s);
    case Act::sigmoid: return aten::sigmoid_backward(t, s);
    default: return t;
  }
}

// ---- by a kernel -----------------------------------------------------------------------------------------------------

// In torch's operators a step of a network with second derivatives took up to twice the time of stock's with gelu. With tanh it
// had 0.96 to 1.0 of stock's speed at 256 and 2,000 points on a Xeon, and has 1.0 to 1.11 by the kernel.
struct ActDerivative : Function<ActDerivative> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& t, const at::Tensor& s, int64_t act,
                               int64_t order) {
    ctx->save_for_backward({t, s});
    ctx->set_materialize_grads(false);
    ctx->save("act", act);
    ctx->save("order", order);
    return {by_kernel(t, s, act, order)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &t = saved[0], &s = saved[1], &g = grads[0];
    const int64_t act = ctx->saved<int64_t>("act"), order = ctx->saved<int64_t>("order");
    if (!g.defined()) return {at::Tensor(), at::Tensor()};
    return {ctx->needs_input_grad(0) ? act_derivative(g, s, act, 0, order) : at::Tensor(),
            ctx->needs_input_grad(1) ? act_derivative(g.mul(t), s, act, 0, order + 1) : at::Tensor()};
  }

  static bool takes(const at::Tensor& t, const at::Tensor& s, Act act, int64_t order) {
    return order <= derivative_orders(act) && t.sizes() == s.sizes() && t.scalar_type() == s.scalar_type() &&
           is_opaque(t) && is_opaque(s) && is_plain_on_cpu(t) && is_plain_on_cpu(s);
  }

  static at::Tensor by_kernel(const at::Tensor& t, const at::Tensor& s, int64_t act, int64_t order) {
    const at::Tensor a = t.contiguous(), b = s.contiguous(), out = new_empty(s.sizes(), s.options());
    kCpu.derivative_pass({out.numel(), a.const_data_ptr(), b.const_data_ptr(), static_cast<Act>(act),
                          static_cast<int>(order), out.data_ptr()},
                         dtype_of(s, "act_derivative"));
    return out;
  }
};

// ---- a layer -------------------------------------------------------------------------------------------------------

at::Tensor rows(const at::Tensor& t) { return t.dim() == 2 ? t : t.reshape({rows_of(t), t.size(-1)}); }

// A mask as 1 where the bit is set and 0 elsewhere, [..., N]: every derivative at these numbers is the one at y. The result
// depends on the anchor, which has no elements.
at::Tensor unpacked(const at::Tensor& mask, at::ScalarType dtype, const at::Tensor& anchor) {
  const at::Tensor bits = aten::arange(kMaskBits, mask.options());
  const at::Tensor ones = mask.unsqueeze(-1).__rshift__(bits).bitwise_and(1).flatten(-2).to(dtype);
  return anchor.defined() ? ones.add(anchor.sum()) : ones;
}

Gradients products(const at::Tensor& q, const LayerBackward& b) {
  const auto [need_x, need_weight, need_bias] = b.needs;
  Gradients out;
  if (need_x && b.weight.defined()) std::get<0>(out) = q.matmul(b.weight);
  if (need_weight && b.x.defined()) std::get<1>(out) = b.stacked ? q.mT().matmul(b.x) : rows(q).t().matmul(rows(b.x));
  if (need_bias) std::get<2>(out) = b.stacked ? q.sum(-2) : rows(q).sum(0);
  return out;
}

// The gradients from g, the gradient of y or, with the identity, of z. Where nobody looks into the backward the layer's own op
// makes them.
Gradients through(const at::Tensor& g, const at::Tensor& saved, int64_t act, const LayerBackward& b) {
  if (b.stacked || c10::GradMode::is_enabled() || !is_opaque(g))
    return products(static_cast<Act>(act) == Act::none ? g : act_derivative(g, saved, act, b.slope, 1), b);
  using F = Gradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&, int64_t,
                      double, bool, bool, bool);
  static const auto op = dispatched<F>("dlkernels::_linear_act_backward");
  return op.call(g, present(b.x), present(b.weight), saved, act, b.slope, b.needs[0], b.needs[1], b.needs[2]);
}

}  // namespace

at::Tensor act_derivative(const at::Tensor& t, const at::Tensor& s, int64_t act, double slope, int64_t order) {
  const Act kind = check_activation(act, slope, "act_derivative").kind;
  TORCH_CHECK_VALUE(order >= 1, "act_derivative: expected an order of at least 1, got ", order);
  if (!ActDerivative::takes(t, s, kind, order)) return in_torch(t, s, kind, slope, order);
  const bool recorded = c10::GradMode::is_enabled() && (t.requires_grad() || s.requires_grad());
  return recorded ? ActDerivative::apply(t, s, act, order)[0] : ActDerivative::by_kernel(t, s, act, order);
}

at::Tensor sum_present(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a.add(b);
}

Gradients backward_in_torch(const LayerBackward& b) {
  at::Tensor g = b.grad_y, grad_z = b.grad_saved, saved = b.saved;
  if (is_mask(saved)) {
    if (!g.defined() && grad_z.defined()) {  // the anchor's gradient alone
      std::vector<int64_t> sizes = resized_last(saved, saved.size(-1) * kMaskBits);
      g = aten::zeros(sizes, grad_z.options());
    }
    grad_z = at::Tensor();
    if (g.defined()) saved = unpacked(saved, g.scalar_type(), b.anchor);
  }
  Gradients out;
  // The identity's backward reads no saved tensor: g takes its place, a tensor of the same shape.
  if (g.defined()) out = through(g, saved.defined() ? saved : g, b.act, b);
  if (!grad_z.defined()) return out;
  const auto [dx, dweight, dbias] = through(grad_z, grad_z, static_cast<int64_t>(Act::none), b);
  return {sum_present(std::get<0>(out), dx), sum_present(std::get<1>(out), dweight),
          sum_present(std::get<2>(out), dbias)};
}

Gradients linear_act_differentiable_backward(const OptionalTensor& grad_y, const OptionalTensor& grad_saved,
                                             const OptionalTensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& saved, const OptionalTensor& anchor, int64_t act,
                                             double slope, bool need_x, bool need_weight, bool need_bias,
                                             bool stacked) {
  const auto get = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
  check_activation(act, slope, "linear_act");
  return backward_in_torch({get(grad_y),
                            get(grad_saved),
                            get(x),
                            get(weight),
                            get(saved),
                            get(anchor),
                            act,
                            slope,
                            {need_x, need_weight, need_bias},
                            stacked});
}

}  // namespace dlk
