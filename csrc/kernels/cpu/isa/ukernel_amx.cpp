// AMX: bf16 products of more than one row on tiles, and the fused MLP. All other kernels are those of AVX-512 BF16; isa.cpp
// puts the two sets together.
#if defined(__x86_64__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#define DLK_ISA amx
#define DLK_VBYTES 64
#define DLK_MR 32
#define DLK_NV 2
#define DLK_BF16_PAIRS
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/isa/vmath.h"
#include "kernels/cpu/gemm/gemm_traits.h"
#include "kernels/cpu/gemm/strided_rows.h"
#include "kernels/cpu/gemm/epilogue.h"
#include "kernels/cpu/gemm/ukernel.h"
#include "kernels/cpu/gemm/amx.h"
#include "kernels/cpu/gemm/tiling.h"
#include "kernels/cpu/gemm/packing.h"
#include "kernels/cpu/gemm/ahead.h"
#include "kernels/cpu/gemm/transposed.h"
#include "kernels/cpu/gemm/block.h"
#include "kernels/cpu/gemm/gemm.h"
#include "kernels/cpu/gemm/amx_few_rows.h"
#include "kernels/cpu/gemm/autocast.h"
#include "kernels/cpu/mlp/fused_mlp.h"

namespace dlk::cpu {

extern const PackedProduct k_amx_bf16, k_amx_f32_in_bf16;
extern const FewForward k_amx_few_forward;
extern const FusedMlpKernels k_amx_fused_mlp;
extern const PackedLayer k_amx_autocast_f32_x, k_amx_autocast_bf16_x;
extern int64_t (*const k_amx_peak_loop)(int64_t);
constexpr PackedProduct k_amx_bf16 = amx::packed_product<amx::AmxPairs<amx::Bf16>>();
constexpr FewForward k_amx_few_forward = {&amx::few_rows_tiles<amx::AmxPairs<amx::Bf16>>, 2, 512};
constexpr FusedMlpKernels k_amx_fused_mlp = amx::fused_mlp<amx::AmxPairs<amx::Bf16>>();
constexpr PackedProduct k_amx_f32_in_bf16 = amx::packed_product<amx::AmxPairs<float>>();
constexpr PackedLayer k_amx_autocast_f32_x = amx::packed_autocast<amx::AmxPairs, float>();
constexpr PackedLayer k_amx_autocast_bf16_x = amx::packed_autocast<amx::AmxPairs, amx::Bf16>();
int64_t (*const k_amx_peak_loop)(int64_t) = &amx::tile_peak_loop;

}  // namespace dlk::cpu
#endif
