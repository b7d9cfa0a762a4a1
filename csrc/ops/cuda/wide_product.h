// torch's product of 16-bit operands into float32, which CUDA alone has. Nothing is rounded in between.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

namespace dlk::cuda {

// out = left · right in out's dtype, or out += left · right if `adds`.
inline void wide_product(at::Tensor out, const at::Tensor& left, const at::Tensor& right, bool adds) {
  if (adds)
    at::addmm_out(out, out, left, right, out.scalar_type());
  else
    at::mm_out(out, left, right, out.scalar_type());
}

}  // namespace dlk::cuda
