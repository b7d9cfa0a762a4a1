// Any processor: 16-byte compiler vectors (SSE2, NEON, ...), micro-tiles of 4 rows x 2 registers.
#define DLK_ISA portable
#define DLK_VBYTES 16
#define DLK_MR 4
#define DLK_NV 2
#define DLK_DOT_M 2
#define DLK_DOT_N 2
#include "kernels/cpu/isa/kernel_set.h"

namespace dlk::cpu {

extern const Kernels k_portable;
const Kernels k_portable = {
    "portable",
    {portable::make_kernel_table<portable::Convert<double>>("f64 4x4 portable"),
     portable::make_kernel_table<portable::Convert<float>>("f32 4x8 portable"),
     portable::make_kernel_table<portable::Convert<portable::Bf16>>("bf16 widened to f32 4x8 portable"),
     portable::make_kernel_table<portable::Convert<portable::F16>>("f16 widened to f32 4x8 portable")},
};

}  // namespace dlk::cpu
