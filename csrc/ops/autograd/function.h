// The ops that autograd records. Each is a torch::autograd::Function over the private ops: its forward calls one, its backward
// another. A backward that is itself differentiated calls an op that is written in Python (dlkernels/_ops), in torch's
// operators.
#pragma once

#include <ATen/TracerMode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include "ops/tensors.h"

namespace dlk {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The op of this name, through the dispatcher: modes, subclasses and compilers see the call. F is its C++ signature.
template <class F>
auto dispatched(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<F>();
}

inline OptionalTensor present(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// The weight for backward: the memory that it has now, as in stock, which saves weight.t(). Somebody may give the weight
// another .data before backward. The copy shares the version, so a change in place raises. Subclasses and wrappers have no
// .data to replace, and see the weight itself.
inline at::Tensor with_its_memory(const at::Tensor& weight) {
  constexpr c10::DispatchKeySet plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) |
                                        c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                        c10::autocast_dispatch_keyset;
  if ((weight.key_set().raw_repr() & ~plain.raw_repr()) != 0 || weight.is_inference()) return weight;
  at::Tensor copy(weight.unsafeGetTensorImpl()->shallow_copy_and_detach(torch::autograd::impl::version_counter(weight),
                                                                        /*allow_tensor_metadata_change=*/false));
  if (weight.requires_grad())
    torch::autograd::impl::set_gradient_edge(copy, torch::autograd::impl::gradient_edge(weight));
  return copy;
}

// Return true if nobody looks into a backward that gets g: it is not recorded, g is neither a batch of gradients nor has it a
// tangent, and neither a transform of torch.func nor torch.jit.trace is active.
inline bool is_opaque_backward(const at::Tensor& g) {
  if (!g.defined() || c10::GradMode::is_enabled() || at::tracer::impl::is_dispatch_enabled()) return false;
  const c10::DispatchKeySet keys = c10::impl::tls_local_dispatch_key_set().included_;
  return !keys.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) && !g.key_set().has(c10::DispatchKey::Batched) &&
         !g._fw_grad(0).defined();
}

}  // namespace dlk
