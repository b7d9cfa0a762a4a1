// What the host ops of both twins share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "params.h"

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

// The gradient of a layer's pre-activation: g · act'(saved), or g itself where `saved` is undefined.
struct Incoming {
  at::Tensor g, saved;
};

// The layer below, whose act' the dgrad epilogue may apply on the way out, and whose dbias it may then sum.
struct Gate {
  at::Tensor saved;
  Activation act;
  at::Tensor dbias;  // where defined: CUDA's epilogue fills it if it applies the mask and can
  bool applied = false, summed = false;
};

}  // namespace dlk
