// AVX2: micro-tiles of 6 rows x 2 registers.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#define DLK_ISA avx2
#define DLK_VBYTES 32
#define DLK_MR 6
#define DLK_NV 2
#define DLK_DOT_M 2
#define DLK_DOT_N 4
#include "kernels/cpu/isa/kernel_set.h"

namespace dlk::cpu {

extern const Kernels k_avx2;
const Kernels k_avx2 = {
    "avx2",
    {avx2::make_kernel_table<avx2::Convert<double>>("f64 6x8 avx2"),
     avx2::make_kernel_table<avx2::Convert<float>>("f32 6x16 avx2"),
     avx2::make_kernel_table<avx2::Convert<avx2::Bf16>>("bf16 widened to f32 6x16 avx2"),
     avx2::make_kernel_table<avx2::Convert<avx2::F16>>("f16 widened to f32 6x16 avx2")},
};

}  // namespace dlk::cpu
#endif
