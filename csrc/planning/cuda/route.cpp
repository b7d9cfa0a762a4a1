#include "planning/cuda/route.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dlk::cuda {
namespace {

bool takes(Path path, const RouteQuery& a) {
  switch (path) {
    case Path::mma: return is_16_bit(a.dtype);
    case Path::simt: return !is_16_bit(a.dtype);
    case Path::hopper: return is_16_bit(a.dtype) && a.hopper;
    case Path::fused_mlp: return a.narrow;
    case Path::cublas: return true;
    default: return false;
  }
}

const RouteRow* measured_route(const RouteQuery& a) {
  if (!a.routes || (a.dtype == DType::f32 && a.tf32))
    return nullptr;  // f32 is measured as it is by default, without TF32
  const RouteRow* row = a.routes->find(a.op, a.dtype, a.shape, a.arch);
  return row && takes(row->path, a) ? row : nullptr;
}

// Where nothing was measured the careful choice is cuBLAS, which is tuned everywhere, with our fused passes around it: the
// pass behind a backward moves fewer bytes than stock's. Our own products are taken where memory or launches bound a layer,
// which fusion reduces, and not where arithmetic does. (By arithmetic, for every architecture: no figure behind it.)
constexpr double kLarge = 1e8;         // multiplications that hide a launch or two on any GPU
constexpr int64_t kLongestSum = 1024;  // a longer one occupies few multiprocessors for long, or moves little beside it
constexpr double kTiny = 1 << 20;
constexpr int64_t kTinySum = 128;

Route unmeasured(const RouteQuery& a) {
  const auto [m, n, k] = a.shape;
  const double multiplications = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  // The chain kernels move the least: backward is one read of g, y and x where products read g and y twice.
  if (takes(Path::fused_mlp, a) && is_16_bit(a.dtype) && (a.in_rows || multiplications < kLarge))
    return {Path::fused_mlp,
            "narrow: the weight rests in shared memory, backward is one launch and its sum (not measured here)"};
  if (multiplications >= kLarge)
    return {Path::cublas,
            "large: cuBLAS's products are tuned on every architecture; our passes around it (not measured here)"};
  // wgrad cuts its sum, over rows, in slices.
  const int64_t sum = a.op == Op::forward ? k : a.op == Op::dgrad ? n : std::min(m, kLongestSum / 8);
  if (is_16_bit(a.dtype)) {
    if (!a.aligned && multiplications >= kTiny)
      return {Path::cublas, "operands not 16-byte aligned: cuBLAS, our passes around it (not measured here)"};
    if (sum > kLongestSum)
      return {Path::cublas, "a long sum for few tiles: cuBLAS cuts it; our passes around it (not measured here)"};
    return {Path::mma, "small: tensor cores, epilogue in registers, one launch (not measured here)"};
  }
  if (multiplications < kTiny && sum <= kTinySum)
    return {Path::simt, "tiny: one launch, epilogue included (not measured here)"};
  return {Path::cublas,
          "plain FMAs: cuBLAS's kernels are tuned, ours are not; our passes around it (not measured here)"};
}

}  // namespace

const Path* forced_path() {
  static constexpr Path kPaths[] = {Path::simt, Path::mma, Path::hopper, Path::cublas, Path::fused_mlp};
  static const Path* const value = [] {
    const char* text = std::getenv("DLKERNELS_CUDA_GEMM");
    const std::string s = text ? text : "";
    if (s.empty()) return static_cast<const Path*>(nullptr);
    for (const Path& path : kPaths)
      if (s == name(path)) return &path;
    throw std::runtime_error("DLKERNELS_CUDA_GEMM must be simt, mma, hopper, cublas or fused_mlp, got '" + s + "'");
  }();
  return value;
}

Route route(const RouteQuery& a) {
  const auto [m, n, k] = a.shape;
  if (m == 0 || n == 0 || k == 0) return {is_16_bit(a.dtype) ? Path::mma : Path::simt, "nothing to multiply"};
  if (a.forced && takes(*a.forced, a)) return {*a.forced, "DLKERNELS_CUDA_GEMM"};
  if (const RouteRow* row = measured_route(a)) return {row->path, row->why.c_str()};
  return unmeasured(a);
}

MlpRoute mlp_route(const MlpQuery& a) {
  if (a.slices == 0) return {0, "the fused MLP kernels do not take these layers, or not all of them together"};
  if (a.routes && !a.forced && !(a.dtype == DType::f32 && a.tf32))
    if (const MlpRow* row = a.routes->find_mlp(a.direction, a.dtype, a.layers, a.arch))
      return {row->fused ? a.slices : 0, row->why.c_str()};
  return {a.slices, "narrow layers: their weights fit in shared memory together"};
}

std::string explained(const Route& r, const RouteQuery& a) {
  const bool nothing = a.shape.m == 0 || a.shape.n == 0 || a.shape.k == 0;
  const bool chosen = (a.forced && takes(*a.forced, a)) || measured_route(a);
  return !nothing && !chosen && takes(Path::hopper, a)
             ? std::string(r.why) + "; hopper_gemm is off until it has been measured on this architecture"
             : r.why;
}

const char* kernel(Path path) {
  switch (path) {
    case Path::simt: return "simt_gemm 64x64x16";
    case Path::mma: return "mma_gemm m16n8k16";
    case Path::hopper: return "hopper_gemm wgmma";
    case Path::cublas: return "cublas";
    case Path::fused_mlp: return "fused_mlp, weights in shared memory";
    default: return "?";
  }
}

}  // namespace dlk::cuda
