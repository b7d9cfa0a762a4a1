// AVX-512 with the bf16 extension: bf16 products by vdpbf16ps, two k steps per instruction; the rest as in AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#define DLK_ISA avx512_bf16
#define DLK_VBYTES 64
#define DLK_MR 14
#define DLK_NV 2
#define DLK_DOT_M 4
#define DLK_DOT_N 6
#define DLK_BF16_PAIRS
#include "kernel_set.h"

namespace dlk::cpu {

extern const Kernels k_avx512;
extern const Kernels k_avx512_bf16;
const Kernels k_avx512_bf16 = {
    "avx512_bf16",
    {k_avx512.engine[0], k_avx512.engine[1],
     avx512_bf16::engine<avx512_bf16::Bf16Pairs<avx512_bf16::Bf16>>("bf16 14x32 avx512_bf16"), k_avx512.engine[3]},
    {"f32 rounded to bf16 14x32 avx512_bf16", avx512_bf16::packed_product<avx512_bf16::Bf16Pairs<float>>()},
};

}  // namespace dlk::cpu
#endif
