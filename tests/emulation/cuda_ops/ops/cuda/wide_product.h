// Replaces csrc's header of this name: torch has no such product on CPU.
#pragma once

#include <ATen/ops/mm.h>

namespace dlk::cuda {

inline void wide_product(at::Tensor out, const at::Tensor& left, const at::Tensor& right, bool adds) {
  const at::Tensor product = at::mm(left.to(out.scalar_type()), right.to(out.scalar_type()));
  adds ? out.add_(product) : out.copy_(product);
}

}  // namespace dlk::cuda
