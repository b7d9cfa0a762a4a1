// The kernels under test, and their template for float tensors (multiplied in bf16), which no set offers yet.
#include "cpu/ukernel_amx.cpp"

namespace dlk::cpu {

void amx_gemm_of_floats(const Gemm& p, const Parallel& parallel) { amx::gemm_with<amx::AmxPairs<float>>(p, parallel); }

}  // namespace dlk::cpu
