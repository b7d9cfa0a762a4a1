// One of a layer's three products as a Gemm (the table in kernels/params.h).
#pragma once

#include "kernels/params.h"

namespace dlk {

// left, right: x, weight for forward; dz, weight for dgrad; dz, x for wgrad. Sets sizes and operands; the caller sets
// outputs and epilogue.
inline Gemm product(Op op, const Shape& s, DType dtype, const View& left, const View& right) {
  Gemm p{};
  p.dtype = dtype;
  p.splits = 1;
  switch (op) {
    case Op::forward: p.m = s.m, p.n = s.n, p.k = s.k, p.a = left, p.b = right.transposed(); break;
    case Op::dgrad: p.m = s.m, p.n = s.k, p.k = s.n, p.a = left, p.b = right; break;
    case Op::wgrad: p.m = s.n, p.n = s.k, p.k = s.m, p.a = left.transposed(), p.b = right; break;
  }
  return p;
}

}  // namespace dlk
