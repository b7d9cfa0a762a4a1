// One of a layer's three products as the kernels and the dispatcher see it. No torch.
#pragma once

#include "kernels/cuda/kernels.h"
#include "planning/cuda/route.h"

namespace dlk::cuda {

// left, right: x, weight for forward; dz, weight for dgrad; dz, x for wgrad. What the product computes; not where to.
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

// A layer as a chain of one, described as far as fused_mlp_takes and fused_mlp_slices read it.
struct FusedMlpOfOne {
  FusedMlpLayer layer{};
  FusedMlp chain{};

  explicit FusedMlpOfOne(const Shape& s) {
    layer.n = s.n, layer.k = s.k;
    chain.rows = s.m;
    chain.layers = 1;
    chain.layer = &layer;
  }
  FusedMlpOfOne(const FusedMlpOfOne&) = delete;  // chain points to layer
};

// Whether rows of 16 bits lie so that the chain kernels read more than an element at a time. (All f32 that is contiguous
// along its rows does.)
inline bool fused_mlp_takes_fast(const View& rows, int64_t cols) {
  const bool words = rows.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(rows.data) % 4 == 0;
  const bool gapless = rows.row_stride == cols && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  return rows.col_stride == 1 && (words || gapless);
}

// In how many slices a product's sum is cut.
inline int splits_of(Path path, Op op, const Shape& s, DType dtype) {
  if (op != Op::wgrad || path == Path::cublas) return 1;
  if (path == Path::fused_mlp) return fused_mlp_slices(FusedMlpOfOne(s).chain, dtype);
  return gemm_splits(s.n, s.k, s.m);
}

// `hopper`: hopper_available() on the device, which is the current one.
inline Route route_of(Op op, const Shape& s, DType dtype, const View& left, const View& right, bool tf32, int arch,
                      bool hopper) {
  const Gemm p = product(op, s, dtype, left, right);
  const bool aligned = mma_takes_fast(p.a, dtype) && mma_takes_fast(p.b, dtype);
  const View& rows = op == Op::wgrad ? right : left;  // of x or of dz
  const bool in_rows = fused_mlp_takes_fast(rows, op == Op::dgrad ? s.n : s.k);
  const bool chain = fused_mlp_takes(FusedMlpOfOne(s).chain, dtype);
  return route({op, s, dtype, dtype == DType::f32 && tf32, aligned, in_rows, arch, hopper && hopper_takes(p), chain});
}

}  // namespace dlk::cuda
