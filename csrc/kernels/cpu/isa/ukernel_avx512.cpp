// AVX-512 (F, BW, VL, DQ): micro-tiles of 14 rows x 2 registers.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#define DLK_ISA avx512
#define DLK_VBYTES 64
#define DLK_MR 14
#define DLK_NV 2
#define DLK_DOT_M 4
#define DLK_DOT_N 6
#include "kernels/cpu/isa/kernel_set.h"

namespace dlk::cpu {

extern const Kernels k_avx512;
const Kernels k_avx512 = {
    "avx512",
    {avx512::make_kernel_table<avx512::Convert<double>>("f64 14x16 avx512"),
     avx512::make_kernel_table<avx512::Convert<float>>("f32 14x32 avx512"),
     avx512::make_kernel_table<avx512::Convert<avx512::Bf16>>("bf16 widened to f32 14x32 avx512"),
     avx512::make_kernel_table<avx512::Convert<avx512::F16>>("f16 widened to f32 14x32 avx512")},
};

}  // namespace dlk::cpu
#endif
