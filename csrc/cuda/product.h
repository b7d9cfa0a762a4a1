// One of a layer's three products as the kernels and the dispatcher see it. No torch.
#pragma once

#include "kernels.h"
#include "route.h"

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

// f of a layer as a chain of one, described as far as chain_takes and chain_slices read it.
template <class F>
auto as_chain(const Shape& s, F&& f) {
  ChainLayer layer{};
  layer.n = s.n, layer.k = s.k;
  Chain p{};
  p.rows = s.m;
  p.layers = 1;
  p.layer = &layer;
  return f(p);
}

// In how many slices a product's sum is cut.
inline int splits_of(Path path, Op op, const Shape& s, DType dtype) {
  if (op != Op::wgrad || path == Path::cublas) return 1;
  if (path == Path::chain) return as_chain(s, [&](const Chain& p) { return chain_slices(p, dtype); });
  return gemm_splits(s.n, s.k, s.m);
}

// `hopper`: hopper_available() on the device, which is the current one.
inline Route route_of(Op op, const Shape& s, DType dtype, const View& left, const View& right, bool tf32, int arch,
                      bool hopper) {
  const Gemm p = product(op, s, dtype, left, right);
  const bool aligned = mma_takes_fast(p.a, dtype) && mma_takes_fast(p.b, dtype);
  const bool chain = as_chain(s, [&](const Chain& p) { return chain_takes(p, dtype); });
  return route({op, s, dtype, dtype == DType::f32 && tf32, aligned, arch, hopper && hopper_takes(p), chain});
}

}  // namespace dlk::cuda
