// What the CPU host ops share: torch's threads, the kernels of a dtype, accumulators.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "ops/host.h"
#include "kernels/cpu/isa/isa.h"

namespace dlk::cpu {

// torch's own threads. Waking them costs some microseconds, which is 100 thousand multiplications.
inline Parallel parallel_for_work(int64_t operations) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads == 1 || operations < 100000)
    return {1, [](int64_t tasks, const void* context, void (*body)(const void*, int64_t, int64_t)) {
              if (tasks > 0) body(context, 0, tasks);
            }};
  return {threads, [](int64_t tasks, const void* context, void (*body)(const void*, int64_t, int64_t)) {
            at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

inline const KernelTable& kernel_table(DType dtype) { return kernels().table[static_cast<int>(dtype)]; }

inline const FewForward& few_forward(DType dtype, int64_t rows) {
  const FewForward& tiles = kernel_table(dtype).tiles_forward;
  return tiles.run && rows >= tiles.least_rows ? tiles : kernel_table(dtype).few_forward;
}

// Whether torch lets f32 products run in bf16: set_float32_matmul_precision("medium"), torch.backends.mkldnn.
inline bool bf16_products_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
         at::Float32Precision::BF16;
}
inline const PackedProduct& packed_product(DType dtype) {
  const Kernels& set = kernels();
  const bool in_bf16 = dtype == DType::f32 && set.f32_in_bf16.ukernel && bf16_products_allowed();
  return in_bf16 ? set.f32_in_bf16.packed : kernel_table(dtype).packed;
}

using dlk::accumulators;  // and of a dtype
inline at::Tensor accumulators(int64_t count, DType dtype) {
  return at::empty({count}, at::TensorOptions().dtype(dtype == DType::f64 ? at::kDouble : at::kFloat));
}

inline at::Tensor scratch_tensor(int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

}  // namespace dlk::cpu
