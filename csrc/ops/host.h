// What the host ops of both twins share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "ops/linear_act.h"
#include "kernels/params.h"

namespace dlk {

// Accumulators are f32, or f64 for f64.
inline at::ScalarType accumulator_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
inline at::Tensor accumulators(int64_t count, const at::Tensor& like) {
  return at::empty({count}, like.options().dtype(accumulator_type(like)));
}

// t's sizes with another last one.
inline std::vector<int64_t> resized_last(const at::Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// The gradients asked for, of a layer whose output is like g: not yet written, or, where the layer has no output, zero.
inline Gradients new_gradients(const Shape& s, const at::Tensor& g, at::ScalarType x, at::ScalarType parameters,
                               bool need_x, bool need_weight, bool need_bias) {
  auto make = [&](at::IntArrayRef sizes, at::ScalarType dtype) {
    const at::TensorOptions options = g.options().dtype(dtype);
    return s.m == 0 || s.n == 0 ? at::zeros(sizes, options) : at::empty(sizes, options);
  };
  Gradients made;
  if (need_x) std::get<0>(made) = make(resized_last(g, s.k), x);
  if (need_weight) std::get<1>(made) = make({s.n, s.k}, parameters);
  if (need_bias) std::get<2>(made) = make({s.n}, parameters);
  return made;
}
// In the dtype of g.
inline Gradients new_gradients(const Shape& s, const at::Tensor& g, bool need_x, bool need_weight, bool need_bias) {
  return new_gradients(s, g, g.scalar_type(), g.scalar_type(), need_x, need_weight, need_bias);
}

// What a layer's forward fills: y, and where they are defined z and y's mask (params.h).
struct Outputs {
  at::Tensor y, z, mask;
};

// The gradient of a layer's pre-activation: g · act'(saved), or g itself where `saved` is undefined. On CUDA
// `saved` may be a mask, of uint8.
struct OutputGrad {
  at::Tensor g, saved;
};

// The layer below, whose act' the dgrad epilogue may apply on the way out, and whose dbias it may then sum.
struct BackwardEpilogue {
  at::Tensor saved;
  Activation act;
  at::Tensor dbias;  // where defined: CUDA's epilogue fills it if it applies the mask and can
  bool applied = false, summed = false;
};

}  // namespace dlk
