// The passes of forward, behind a library's products: y = act(z) and its mask; and of a gated layer y = act(gate) · up, whose
// operands may be the halves of longer rows.
#include "kernels/cuda/gemm/epilogue.cuh"

namespace dlk::cuda {
namespace {

uintptr_t addresses(const ActPass& p) { return reinterpret_cast<uintptr_t>(p.z) | reinterpret_cast<uintptr_t>(p.y); }
uintptr_t addresses(const GluPass& p) {
  return reinterpret_cast<uintptr_t>(p.gate) | reinterpret_cast<uintptr_t>(p.up) | reinterpret_cast<uintptr_t>(p.y);
}

DLK_HD int64_t count_of(const ActPass& p) { return p.count; }
DLK_HD int64_t count_of(const GluPass& p) { return p.m * p.n; }

// Packs of this width lie in one row of the operands.
bool allows_width(const ActPass&, int64_t) { return true; }
bool allows_width(const GluPass& p, int64_t width) {
  return p.pitch == p.n || (p.n % width == 0 && p.pitch % width == 0);
}

// Make y[at ... at + kWidth).
template <class T, class Functor, int kWidth>
DLK_DEVICE void make_y(const ActPass& p, int64_t at) {
  using O = Ops<Acc<T>>;
  Acc<T> v[kWidth];
  load<T>(p.z, at, v);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) v[e] = Functor::template value<O>(v[e], O::lit(p.act.slope));
  if constexpr (kHasMask<T, kWidth> && Functor::needs_sign_only) {
    if (p.mask) store_mask<Functor, T>(p.mask, at, v);
  }
  store<T>(p.y, at, v);
}
template <class T, class Functor, int kWidth>
DLK_DEVICE void make_y(const GluPass& p, int64_t at) {
  using O = Ops<Acc<T>>;
  Acc<T> gate[kWidth], up[kWidth];
  const int64_t from = p.pitch == p.n ? at : at / p.n * p.pitch + at % p.n;
  load<T>(p.gate, from, gate);
  load<T>(p.up, from, up);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) up[e] *= Functor::template value<O>(gate[e], O::lit(p.act.slope));
  store<T>(p.y, at, up);
}

// The first `packed` elements are handled 16 bytes at a time. 4 blocks per SM are 64 registers a thread; without a bound
// sm_100a takes 32 and spills the erf of f64.
constexpr int kFlatThreads = 256;
template <class T, class Pass>
__global__ void __launch_bounds__(kFlatThreads, 4) flat_pass_kernel(const Pass p, const int64_t packed) {
  const int64_t stride = int64_t{gridDim.x} * kFlatThreads, first = int64_t{blockIdx.x} * kFlatThreads + threadIdx.x;
  with_activation(p.act.kind, [&](auto act) {
    for (int64_t at = first * kPack<T>; at < packed; at += stride * kPack<T>) make_y<T, decltype(act), kPack<T>>(p, at);
    for (int64_t at = packed + first; at < count_of(p); at += stride) make_y<T, decltype(act), 1>(p, at);
  });
}

template <class Pass>
cudaError_t run(DType dtype, const Pass& p, cudaStream_t stream) {
  const int64_t count = count_of(p);
  if (count == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    // Memory of the allocator is aligned, so all but the last few elements are in packs.
    const bool packs = addresses(p) % 16 == 0 && allows_width(p, kPack<T>);
    const int64_t packed = packs ? count / kPack<T> * kPack<T> : 0;
    const dim3 grid(grid_of(ceil_div(count, kFlatThreads * kPack<T>)));
    return launch(flat_pass_kernel<T, Pass>, grid, kFlatThreads, 0, stream, p, packed);
  });
}

}  // namespace

cudaError_t act_pass(DType dtype, const ActPass& p, cudaStream_t stream) {
  if (p.mask && p.count && !fills_mask_bytes(dtype, p.count, {p.z, p.y})) return cudaErrorInvalidValue;
  return run(dtype, p, stream);
}

cudaError_t glu_pass(DType dtype, const GluPass& p, cudaStream_t stream) { return run(dtype, p, stream); }

}  // namespace dlk::cuda
