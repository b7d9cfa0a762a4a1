// One layer's problem, as planning sees it: sizes, dtypes, strides, and which results are wanted. No tensors.
#pragma once

#include "kernels/params.h"

namespace dlk {

// Under bf16 autocast on CPU parameters are in f32, and x in f32 or bf16; kernels round them as they multiply.
enum class Casts : int32_t { none, f32_x, bf16_x };

// y = act(x · weightᵀ + bias)
struct Problem {
  Shape shape;
  DType dtype;  // of y
  Activation act;
  Casts casts = Casts::none;

  // The layer has no output: nothing is multiplied, and gradients of parameters are 0.
  bool is_empty() const { return shape.m == 0 || shape.n == 0; }
};

struct ForwardProblem : Problem {
  View x, weight;  // [m, k], [n, k]
  bool z;          // the pre-activation is wanted beside y
  bool mask;       // likewise one bit per element of y
};

struct BackwardProblem : Problem {
  View grad_y;              // [m, n]
  bool saved;               // dz = grad_y · act'(saved); otherwise grad_y is dz
  View x, weight;           // null where they are not given
  bool dx, dweight, dbias;  // wanted
  bool below;               // dx may be multiplied by act' of the layer below
  bool dbias_below;         // the dbias of that layer is wanted too
};

}  // namespace dlk
