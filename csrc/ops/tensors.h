// Tensors that the ops of every device allocate and describe.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels/cpu/huge_pages.h"
#include "kernels/params.h"
#include "ops/aten.h"
#include "ops/optional_tensors.h"

namespace dlk {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // dx, dweight, dbias; undefined where not wanted

// An output or scratch that nothing has been written to yet. On CPU large ones ask for huge pages.
inline at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor t = aten::empty(sizes, options);
  if (t.is_cpu()) cpu::ask_for_huge_pages(t.const_data_ptr(), t.nbytes());
  return t;
}

// f32, or f64 for f64.
inline at::ScalarType accumulator_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
inline at::Tensor accumulators(int64_t count, const at::Tensor& like) {
  return new_empty({count}, like.options().dtype(accumulator_type(like)));
}

// t's device as the current one. The CPU needs none, and a guard costs a tenth of a small layer's call.
inline std::optional<c10::Device> guarded_device(const at::Tensor& t) {
  return t.is_cpu() ? std::nullopt : std::optional<c10::Device>(t.device());
}

inline void* data_or_null(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }
inline const void* const_data_or_null(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

inline at::Tensor contiguous_or_none(const OptionalTensor& t) { return t ? t->contiguous() : at::Tensor(); }

// t's sizes with another last one.
inline std::vector<int64_t> resized_last(const at::Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// Member e of a stacked tensor, for kernels: no autograd, and no call of an operator. Undefined stays undefined.
inline at::Tensor member_of(const at::Tensor& t, int64_t e) {
  if (!t.defined()) return t;
  auto impl =
      c10::make_intrusive<at::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()),
                                          t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView, t.dtype());
  impl->set_sizes_and_strides(t.sizes().slice(1), t.strides().slice(1), t.storage_offset() + e * t.stride(0));
  return at::Tensor(std::move(impl));
}

// Return true under a mode in Python that sees operators (TorchDispatchMode).
inline bool has_mode() { return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::Python); }

// A mask holds one bit per element of y (kernels/params.h).
inline bool is_mask(const at::Tensor& t) { return t.defined() && t.scalar_type() == at::kByte; }

// The gradients that are wanted, of a layer whose output is like g. They are not written yet; where the layer has no
// output they are zero.
inline Gradients new_gradients(const Shape& s, const at::Tensor& g, at::ScalarType x, at::ScalarType parameters,
                               bool need_x, bool need_weight, bool need_bias) {
  auto make = [&](at::IntArrayRef sizes, at::ScalarType dtype) {
    const at::TensorOptions options = g.options().dtype(dtype);
    return s.m == 0 || s.n == 0 ? aten::zeros(sizes, options) : new_empty(sizes, options);
  };
  Gradients made;
  if (need_x) std::get<0>(made) = make(resized_last(g, s.k), x);
  if (need_weight) std::get<1>(made) = make({s.n, s.k}, parameters);
  if (need_bias) std::get<2>(made) = make({s.n}, parameters);
  return made;
}

}  // namespace dlk
