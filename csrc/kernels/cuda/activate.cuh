// Activations of a few values in registers.
//
// ReLU, leaky ReLU and none are a comparison each, and kernels have them in their own code. The others are long: where
// each kernel had all of them, for every width and every use, they were most of its code. A source file has one copy of
// them for each number of values, a function that its kernels call.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

// The functions below take and return this struct. The compiler keeps it in registers; it would not keep an array there.
template <class A, int kCount>
struct Values {
  A at[kCount];
};

template <class A, int kCount>
__device__ __attribute__((noinline)) Values<A, kCount> value_of(Activation activation, Values<A, kCount> z) {
  using O = Ops<A>;
  with_activation(activation.kind, [&](auto act) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) z.at[e] = decltype(act)::template value<O>(z.at[e], O::lit(activation.slope));
  });
  return z;
}
template <class A, int kCount>
__device__ __attribute__((noinline)) Values<A, kCount> gradient_of(Activation activation, Values<A, kCount> g,
                                                                   Values<A, kCount> saved) {
  using O = Ops<A>;
  with_activation(activation.kind, [&](auto act) {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      g.at[e] = decltype(act)::template grad<O>(g.at[e], saved.at[e], O::lit(activation.slope));
  });
  return g;
}

// z = act(z), for an activation that is long.
template <class A, int kCount>
DLK_DEVICE void activate_long(const Activation& activation, A (&z)[kCount]) {
  Values<A, kCount> values;
#pragma unroll
  for (int e = 0; e < kCount; ++e) values.at[e] = z[e];
  values = value_of(activation, values);
#pragma unroll
  for (int e = 0; e < kCount; ++e) z[e] = values.at[e];
}
// g = g · act'(saved), for an activation that is long.
template <class A, int kCount>
DLK_DEVICE void gradient_long(const Activation& activation, A (&g)[kCount], const A (&saved)[kCount]) {
  Values<A, kCount> values, read;
#pragma unroll
  for (int e = 0; e < kCount; ++e) values.at[e] = g[e], read.at[e] = saved[e];
  values = gradient_of(activation, values, read);
#pragma unroll
  for (int e = 0; e < kCount; ++e) g[e] = values.at[e];
}

// Call f with the functor of `kind` if it is a comparison, and return whether it is.
template <class F>
DLK_DEVICE bool with_comparison(Act kind, F&& f) {
  switch (kind) {
    case Act::relu: return f(ReLU{}), true;
    case Act::leaky_relu: return f(LeakyReLU{}), true;
    case Act::none: return f(Identity{}), true;
    default: return false;
  }
}

// z = act(z).
template <class A, int kCount>
DLK_DEVICE void activate(const Activation& activation, A (&z)[kCount]) {
  using O = Ops<A>;
  const bool done = with_comparison(activation.kind, [&](auto act) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) z[e] = decltype(act)::template value<O>(z[e], O::lit(activation.slope));
  });
  if (!done) activate_long(activation, z);
}
// g = g · act'(saved).
template <class A, int kCount>
DLK_DEVICE void activation_gradient(const Activation& activation, A (&g)[kCount], const A (&saved)[kCount]) {
  using O = Ops<A>;
  const bool done = with_comparison(activation.kind, [&](auto act) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) g[e] = decltype(act)::template grad<O>(g[e], saved[e], O::lit(activation.slope));
  });
  if (!done) gradient_long(activation, g, saved);
}

}  // namespace dlk::cuda
