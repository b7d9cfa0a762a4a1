// AMX: packed bf16 products by tiles. Everything else is AVX-512 BF16's; isa.cpp puts the two together.
#if defined(__x86_64__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#define DLK_ISA amx
#define DLK_VBYTES 64
#define DLK_MR 32
#define DLK_NV 2
#define DLK_BF16_PAIRS
#include "vec.h"
#include "vmath.h"
#include "engine.h"
#include "runs.h"
#include "epilogue.h"
#include "ukernel.h"
#include "amx.h"
#include "gemm.h"

namespace dlk::cpu {

void amx_gemm(const Gemm& p, const Parallel& parallel) { amx::gemm_with<amx::AmxPairs<amx::Bf16>>(p, parallel); }

}  // namespace dlk::cpu
#endif
