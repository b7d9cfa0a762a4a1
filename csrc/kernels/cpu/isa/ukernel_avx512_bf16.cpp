// AVX-512 with the bf16 extension: vdpbf16ps multiplies bf16, two k steps per instruction. The other element types use
// the kernels of AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#define DLK_ISA avx512_bf16
#define DLK_VBYTES 64
#define DLK_MR 14
#define DLK_NV 2
#define DLK_DOT_M 4
#define DLK_DOT_N 6
#define DLK_BF16_PAIRS
#include "kernels/cpu/isa/kernel_set.h"
#include "kernels/cpu/gemm/autocast.h"

namespace dlk::cpu::avx512_bf16 {

template <class X>
constexpr AutocastLayer autocast_layer() {
  return {
      packed_autocast<Bf16Pairs, X>(),
      {&few_forward_with<Bf16Pairs<X, float, Bf16>>, &few_dgrad_with<Bf16, float, X>, &few_wgrad_with<Bf16, X, float>}};
}

}  // namespace dlk::cpu::avx512_bf16

namespace dlk::cpu {

extern const Kernels k_avx512;
extern const Kernels k_avx512_bf16;
const Kernels k_avx512_bf16 = {
    "avx512_bf16",
    {k_avx512.table[0], k_avx512.table[1],
     avx512_bf16::make_kernel_table<avx512_bf16::Bf16Pairs<avx512_bf16::Bf16>>("bf16 14x32 avx512_bf16"),
     k_avx512.table[3]},
    {"f32 rounded to bf16 14x32 avx512_bf16", avx512_bf16::packed_product<avx512_bf16::Bf16Pairs<float>>()},
    {"bf16, f32 rounded to it 14x32 avx512_bf16", avx512_bf16::autocast_layer<float>(),
     avx512_bf16::autocast_layer<avx512_bf16::Bf16>()},
};

}  // namespace dlk::cpu
#endif
