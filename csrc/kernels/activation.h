// One functor per activation: its value, and its gradient from the tensor that forward saved.
//
// A functor is written once against an `O` ("ops") that names a value type `O::T` - a scalar on CUDA, a vector
// register on CPU - with `O::lit`, `O::exp`, `O::normal_exp`, `O::tanh`, `O::normal_cdf`. Comparisons and `?:` work on both.
//
//   saves_output     true: `grad` reads y;  false: `grad` reads the pre-activation z, which forward then stores
//   needs_sign_only  true: `grad` needs only one bit of y, `is_active`; 1 and 0 may be passed in place of y
//   value(z)         act(z)
//   grad(g, s)       g · act'(·), with s the saved y or z. A masked gradient is selected, not multiplied,
//                    so that an infinite g through an inactive unit gives 0, as in torch.
#pragma once

#include "kernels/params.h"

namespace dlk {

struct Identity {
  static constexpr bool saves_output = true, needs_sign_only = false;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z;
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T, T) {
    return g;
  }
};

// max(z, 0); NaN stays NaN because every comparison with it is false. Gradient at 0 is 0.
struct ReLU {
  static constexpr bool saves_output = true, needs_sign_only = true;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z < O::lit(0) ? O::lit(0) : z;
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T y, T) {
    return y <= O::lit(0) ? O::lit(0) : g;
  }
};

// z > 0 ? z : slope·z. For slope >= 0 (checked at the door) y > 0 exactly where z > 0, so y is enough.
struct LeakyReLU {
  static constexpr bool saves_output = true, needs_sign_only = true;
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

// z·Φ(z), Φ the normal distribution function (Hendrycks & Gimpel, 2016); gradient Φ(z) + z·φ(z).
struct GELU {
  static constexpr bool saves_output = false, needs_sign_only = false;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z * O::normal_cdf(z);
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T z, T) {
    T scaled = O::lit(0.39894228040143267794) * z;  // 1/sqrt(2π); first, for φ(z) alone can be subnormal
    return g * (O::normal_cdf(z) + scaled * O::normal_exp(O::lit(-0.5) * z * z));
  }
};

// The tanh form of GELU: z/2·(1 + tanh u), u = sqrt(2/π)·(z + 0.044715 z³).
struct GELUTanh {
  static constexpr bool saves_output = false, needs_sign_only = false;
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

// z·σ(z); gradient σ(z)·(1 + z·(1 - σ(z))).
struct SiLU {
  static constexpr bool saves_output = false, needs_sign_only = false;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return z / (O::lit(1) + O::exp(-z));
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T z, T) {
    T s = O::lit(1) / (O::lit(1) + O::exp(-z));
    return g * s * (O::lit(1) + z * (O::lit(1) - s));
  }
};

struct Tanh {
  static constexpr bool saves_output = true, needs_sign_only = false;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return O::tanh(z);
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T y, T) {
    return g * (O::lit(1) - y * y);
  }
};

struct Sigmoid {
  static constexpr bool saves_output = true, needs_sign_only = false;
  template <class O, class T = typename O::T>
  DLK_HD static T value(T z, T) {
    return O::lit(1) / (O::lit(1) + O::exp(-z));
  }
  template <class O, class T = typename O::T>
  DLK_HD static T grad(T g, T y, T) {
    return g * (O::lit(1) - y) * y;
  }
};

// The run-time to compile-time switch: calls f with the functor of `kind`. The only list of activations in C++.
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

constexpr int kActivations = 9;

inline bool saves_output(Act kind) {
  return with_activation(kind, [](auto act) { return decltype(act)::saves_output; });
}

inline bool needs_sign_only(Act kind) {
  return with_activation(kind, [](auto act) { return decltype(act)::needs_sign_only; });
}

// Where needs_sign_only: the gradient passes through this y. A mask keeps this bit in place of y.
template <class Functor, class O>
DLK_HD bool is_active(typename O::T y) {
  return Functor::template grad<O>(O::lit(1), y, O::lit(0)) != O::lit(0);
}

}  // namespace dlk
