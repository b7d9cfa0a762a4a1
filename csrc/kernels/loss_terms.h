// The terms of the elementwise losses and their gradients. Like the functors of activation.h they are written once
// against `O`, the operations on a value type.
#pragma once

#include "kernels/loss_params.h"

namespace dlk {

// The loss of one element, and its gradients with respect to x and var.
template <class V>
struct Terms {
  V loss, grad_input, grad_var;
};

// (x - t)², with the gradient 2·(x - t). The 2 divides the divisor: doubled first, a large difference would overflow
// although its share of a mean does not.
template <class O, class V = typename O::T>
struct SquaredError {
  static constexpr bool has_var = false;
  static constexpr double grad_divisor = 0.5;  // kernels divide gradients by this times the call's divisor
  DLK_HD explicit SquaredError(const ElementwiseLoss&) {}
  DLK_HD Terms<V> operator()(V x, V t, V) const {
    const V d = x - t;
    return {d * d, d, V{}};
  }
};

// (ln v + (x - t)²/v)/2 + constant with v = max(var, eps). With r = (x - t)/v the gradients are r and (1 - (x -
// t)·r)/2v: they treat the max as the identity.
template <class O, class V = typename O::T>
struct GaussianNLL {
  static constexpr bool has_var = true;
  static constexpr double grad_divisor = 1;
  const V eps, constant;
  DLK_HD explicit GaussianNLL(const ElementwiseLoss& p) : eps(O::lit(p.eps)), constant(O::lit(p.constant)) {}
  DLK_HD Terms<V> operator()(V x, V t, V var) const {
    const V half = O::lit(0.5), one = O::lit(1);
    const V v = var < eps ? eps : var;
    const V d = x - t, r = d / v;
    return {half * (O::log(v) + d * r) + constant, r, half * (one - d * r) / v};
  }
};

}  // namespace dlk
