#include "route.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace dlk::cpu {
namespace {

// DLKERNELS_CPU_GEMM=own|aten takes the decision away from the table below: for tests, and to measure both.
enum class Forced { no, own, aten };

Forced forced() {
  static const Forced value = [] {
    const char* text = std::getenv("DLKERNELS_CPU_GEMM");
    const std::string s = text ? text : "";
    if (s.empty()) return Forced::no;
    if (s == "own") return Forced::own;
    if (s == "aten") return Forced::aten;
    throw std::runtime_error("DLKERNELS_CPU_GEMM must be own or aten, got '" + s + "'");
  }();
  return value;
}

}  // namespace

Route route(Op op, const Shape& shape, DType dtype, bool contiguous) {
  const bool empty = shape.m == 0 || shape.n == 0 || shape.k == 0;
  if (forced() == Forced::aten && !empty) return {Path::aten, "DLKERNELS_CPU_GEMM=aten"};
  if (forced() == Forced::no && !empty && !isa_capped()) {
    if (dtype == DType::f16 && cpu_features().amx_fp16)
      return {Path::aten,
              "this CPU has AMX-FP16 and dlkernels has no micro-kernel for it: torch's GEMM, our passes around it"};
    if (dtype == DType::bf16 && amx_refused())
      return {Path::aten, "our AMX micro-kernel failed its self-check on this CPU: torch's GEMM, our passes around it"};
  }
  // Measured on AVX-512 BF16 with 128 rows and weights of 17 and 38 million elements: ours 0.76 to 0.95 of torch's speed.
  const bool large_weight = shape.m <= 256 && shape.n * shape.k >= (int64_t{1} << 23);
  if (forced() == Forced::no && dtype == DType::bf16 && large_weight && shape.m > kFewRowsForward &&
      std::string(kernels().isa) == "avx512_bf16")
    return {Path::aten,
            "bf16, a large weight and few rows: torch's GEMM measured faster, our elementwise passes around it"};
  const bool few = op == Op::forward ? shape.m <= kFewRowsForward : shape.m <= kFewRows && shape.m * shape.n <= kFewDz;
  if (contiguous && few && shape.k >= 64 && !empty)
    return {Path::few_rows, "few rows: packing weight would cost more than it saves"};
  return {Path::packed, "our packed GEMM with the fused epilogue"};
}

const char* name(Path path) {
  switch (path) {
    case Path::packed: return "packed";
    case Path::few_rows: return "few_rows";
    case Path::aten: return "aten";
  }
  return "?";
}

}  // namespace dlk::cpu
