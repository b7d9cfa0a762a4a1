// One functor per activation: its value, and its gradient from what forward saved.
//
// A functor is written once against `O`, the operations on a value type `O::T`: a scalar on CUDA, a vector register on
// CPU. `O` has `lit` (a constant), `exp`, `normal_exp`, `tanh` and `normal_cdf`. Comparisons and `?:` work on both
// types.
//
//   saves_output     true: `grad` reads y;  false: `grad` reads the preactivation z, which forward then stores
//   needs_sign_only  true: `grad` needs one bit of y, `is_active`; 1 and 0 may be passed in place of y
//   value(z, slope)    act(z)
//   grad(g, s, slope)  g · act', where s is the saved y or z. ReLU selects g or 0 and does not multiply, so that an
//                      infinite g through an inactive unit gives 0, as in torch.
//   orders             the derivatives that derivative_pass makes: those of y by z, or where s is y, act' and its derivatives
//                      by y. 0 where torch has one operator for each
//   grad2, grad3       t · the derivative of that order
#pragma once

#include "kernels/params.h"

namespace dlk {

// z itself: a layer without an activation.
struct Identity {
  static constexpr bool saves_output = true, needs_sign_only = false;
  static constexpr int orders = 0;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z;
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T, T) {
    return g;
  }
};

// max(z, 0). NaN stays NaN because every comparison with it is false. The gradient at 0 is 0.
struct ReLU {
  static constexpr bool saves_output = true, needs_sign_only = true;
  static constexpr int orders = 0;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z < O::lit(0) ? O::lit(0) : z;
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T y, T) {
    return y <= O::lit(0) ? O::lit(0) : g;
  }
};

// z > 0 ? z : slope·z. The slope is not negative (csrc/ops checks it), so y > 0 exactly where z > 0, and y is enough
// for the gradient.
struct LeakyReLU {
  static constexpr bool saves_output = true, needs_sign_only = true;
  static constexpr int orders = 0;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T slope) {
    return z > O::lit(0) ? z : z * slope;
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T y, T slope) {
    return y > O::lit(0) ? g : g * slope;
  }
};

// max(z, 0)², the squared ReLU of Primer (So et al., 2021).
struct ReLU2 {
  static constexpr bool saves_output = false, needs_sign_only = false;
  static constexpr int orders = 0;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    T r = z < O::lit(0) ? O::lit(0) : z;
    return r * r;
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T z, T) {
    return z <= O::lit(0) ? O::lit(0) : O::lit(2) * z * g;
  }
};

// z·Φ(z), where Φ is the normal distribution function (Hendrycks & Gimpel, 2016). act' = Φ(z) + z·φ(z), where φ is its
// density.
struct GELU {
  static constexpr bool saves_output = false, needs_sign_only = false;
  static constexpr int orders = 3;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z * O::normal_cdf(z);
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T z, T) {
    T scaled = O::lit(0.39894228040143267794) * z;  // 1/sqrt(2π); times z first, because φ(z) alone can be subnormal
    return g * (O::normal_cdf(z) + scaled * O::normal_exp(O::lit(-0.5) * z * z));
  }
  // t · (2 - z²)·φ(z)
  template <class O, class T = typename O::T>
  DLK_HD static T grad2(T t, T z) {
    return t * (O::lit(2) - z * z) * density<O>(z);
  }
  // t · (z² - 4)·z·φ(z)
  template <class O, class T = typename O::T>
  DLK_HD static T grad3(T t, T z) {
    return t * (z * z - O::lit(4)) * z * density<O>(z);
  }
  template <class O, class T = typename O::T>
  DLK_HD static T density(T z) {
    return O::lit(0.39894228040143267794) * O::normal_exp(O::lit(-0.5) * z * z);
  }
};

// The tanh form of GELU: z/2·(1 + tanh u), u = sqrt(2/π)·(z + 0.044715 z³).
struct GELUTanh {
  static constexpr bool saves_output = false, needs_sign_only = false;
  static constexpr int orders = 0;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return O::lit(0.5) * z * (O::lit(1) + O::tanh(inner<O>(z)));
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T z, T) {
    T t = O::tanh(inner<O>(z));
    T du = O::lit(0.79788456080286535588) * (O::lit(1) + O::lit(3 * 0.044715) * z * z);
    return g * (O::lit(0.5) * (O::lit(1) + t) + O::lit(0.5) * z * (O::lit(1) - t * t) * du);
  }
  template <class O, class T = typename O::T>
  DLK_HD static T inner(T z) {
    return O::lit(0.79788456080286535588) * (z + O::lit(0.044715) * z * z * z);  // sqrt(2/π)
  }
};

// z·σ(z), where σ is the sigmoid. act' = σ(z)·(1 + z·(1 - σ(z))).
struct SiLU {
  static constexpr bool saves_output = false, needs_sign_only = false;
  static constexpr int orders = 3;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z / (O::lit(1) + O::exp(-z));
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T z, T) {
    T s = O::lit(1) / (O::lit(1) + O::exp(-z));
    return g * s * (O::lit(1) + z * (O::lit(1) - s));
  }
  // t · s(1 - s)·(2 + z(1 - 2s)), s = σ(z)
  template <class O, class T = typename O::T>
  DLK_HD static T grad2(T t, T z) {
    T s = O::lit(1) / (O::lit(1) + O::exp(-z));
    return t * s * (O::lit(1) - s) * (O::lit(2) + z * (O::lit(1) - O::lit(2) * s));
  }
  // t · s(1 - s)·(3(1 - 2s) + z(1 - 6s(1 - s))), s = σ(z)
  template <class O, class T = typename O::T>
  DLK_HD static T grad3(T t, T z) {
    T s = O::lit(1) / (O::lit(1) + O::exp(-z)), slope = s * (O::lit(1) - s);
    return t * slope * (O::lit(3) * (O::lit(1) - O::lit(2) * s) + z * (O::lit(1) - O::lit(6) * slope));
  }
};

// tanh(z). act' = 1 - y².
struct Tanh {
  static constexpr bool saves_output = true, needs_sign_only = false;
  static constexpr int orders = 2;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return O::tanh(z);
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T y, T) {
    return g * (O::lit(1) - y * y);
  }
  // t · -2y
  template <class O, class T = typename O::T>
  DLK_HD static T grad2(T t, T y) {
    return t * (O::lit(-2) * y);
  }
};

// σ(z) = 1/(1 + e^-z). act' = y·(1 - y).
struct Sigmoid {
  static constexpr bool saves_output = true, needs_sign_only = false;
  static constexpr int orders = 2;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return O::lit(1) / (O::lit(1) + O::exp(-z));
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T y, T) {
    return g * (O::lit(1) - y) * y;
  }
  // t · (1 - 2y)
  template <class O, class T = typename O::T>
  DLK_HD static T grad2(T t, T y) {
    return t * (O::lit(1) - O::lit(2) * y);
  }
};

// Call f with the functor of `kind`: the switch from run time to compile time. No other list of activations exists in
// C++.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f runs where its caller does
#endif
template <class F>
DLK_HD auto with_activation(Act kind, F&& f) {
  switch (kind) {
    case Act::relu: return f(ReLU{});
    case Act::leaky_relu: return f(LeakyReLU{});
    case Act::relu2: return f(ReLU2{});
    case Act::gelu: return f(GELU{});
    case Act::gelu_tanh: return f(GELUTanh{});
    case Act::silu: return f(SiLU{});
    case Act::tanh: return f(Tanh{});
    case Act::sigmoid: return f(Sigmoid{});
    case Act::none: break;
  }
  return f(Identity{});
}

// The number of names in Act.
constexpr int kActivations = 9;

// Return the highest order of the derivatives that derivative_pass makes.
inline int derivative_orders(Act kind) {
  return with_activation(kind, [](auto act) { return decltype(act)::orders; });
}

// Return whether the gradient of `kind` reads y; otherwise it reads z.
inline bool saves_output(Act kind) {
  return with_activation(kind, [](auto act) { return decltype(act)::saves_output; });
}

// Return whether an activation mask can stand for y in the gradient of `kind`.
inline bool needs_sign_only(Act kind) {
  return with_activation(kind, [](auto act) { return decltype(act)::needs_sign_only; });
}

// Return whether y is on the side of 0 where the gradient is g itself, for functors with needs_sign_only. An activation
// mask keeps this bit in place of y.
template <class Functor, class O>
DLK_HD bool is_active(typename O::T y) {
  return Functor::template grad<O>(O::lit(1), y, O::lit(0)) != O::lit(0);
}

}  // namespace dlk
