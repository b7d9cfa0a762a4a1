// Plain structs that describe one call to a kernel: pointers, sizes, strides. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace dlk {

enum class DType : int32_t { f64, f32, bf16, f16 };

// The order is the wire format of the op schemas: dlkernels/_ops/activations.py lists the same names.
enum class Act : int32_t { none, relu, leaky_relu, relu2, gelu, gelu_tanh, silu, tanh, sigmoid };

// y[m, n] = act(x[m, k] · weight[n, k]ᵀ + bias[n])
struct Shape {
  int64_t m, n, k;
};

// A 2-D view of memory; strides in elements, 0 and negative allowed.
struct View {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;

  View transposed() const { return {data, col_stride, row_stride}; }
};

// An activation and the one parameter any of them has (leaky_relu's negative slope).
struct Activation {
  Act kind;
  double slope;
};

}  // namespace dlk
