#include "ops/autograd/function.h"

#include <ATen/TracerMode.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

namespace dlk {
namespace {

std::vector<Backward>& backwards() {
  static std::vector<Backward> all;
  return all;
}

// Return true for a tensor that is of no subclass, and no wrapper of a transform.
bool has_memory_of_its_own(const at::Tensor& t) {
  constexpr c10::DispatchKeySet plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) |
                                        c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                        c10::autocast_dispatch_keyset;
  return (t.key_set().raw_repr() & ~plain.raw_repr()) == 0;
}

// The Function of every op.
struct Recorded : torch::autograd::Function<Recorded> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList, const AnyForward& forward,
                               int64_t backward) {
    ctx->saved_data["backward"] = backward;
    AutogradContext ours(*ctx);
    return forward(&ours);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    AutogradContext ours(*ctx);
    variable_list out = backwards().at(ctx->saved_data["backward"].toInt())(&ours, grads);
    out.resize(out.size() + 2);  // forward and backward, which have no gradients
    return out;
  }
};

}  // namespace

int64_t number_of(Backward backward) {
  backwards().push_back(backward);
  return static_cast<int64_t>(backwards().size()) - 1;
}

variable_list record(at::TensorList inputs, const AnyForward& forward, int64_t backward) {
  return Recorded::apply(inputs, forward, backward);
}

void AutogradContext::save_for_backward(variable_list tensors) { torchs_.save_for_backward(std::move(tensors)); }
void AutogradContext::set_materialize_grads(bool value) { torchs_.set_materialize_grads(value); }
variable_list AutogradContext::get_saved_variables() const { return torchs_.get_saved_variables(); }
bool AutogradContext::needs_input_grad(size_t index) const { return torchs_.needs_input_grad(index); }

void AutogradContext::save(const char* name, int64_t value) { torchs_.saved_data[name] = value; }
void AutogradContext::save(const char* name, double value) { torchs_.saved_data[name] = value; }
void AutogradContext::save(const char* name, bool value) { torchs_.saved_data[name] = value; }
void AutogradContext::save(const char* name, at::IntArrayRef value) { torchs_.saved_data[name] = value; }

template <>
int64_t AutogradContext::saved(const char* name) const {
  return torchs_.saved_data[name].toInt();
}
template <>
double AutogradContext::saved(const char* name) const {
  return torchs_.saved_data[name].toDouble();
}
template <>
bool AutogradContext::saved(const char* name) const {
  return torchs_.saved_data[name].toBool();
}
template <>
std::vector<int64_t> AutogradContext::saved(const char* name) const {
  return torchs_.saved_data[name].toIntVector();
}

at::Tensor with_its_memory(const at::Tensor& weight) {
  if (!has_memory_of_its_own(weight) || weight.is_inference()) return weight;
  at::Tensor copy(weight.unsafeGetTensorImpl()->shallow_copy_and_detach(torch::autograd::impl::version_counter(weight),
                                                                        /*allow_tensor_metadata_change=*/false));
  if (weight.requires_grad())
    torch::autograd::impl::set_gradient_edge(copy, torch::autograd::impl::gradient_edge(weight));
  return copy;
}

bool is_plain_on_cpu(const at::Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && has_memory_of_its_own(t) && !has_mode();
}

bool is_opaque(const at::Tensor& t) {
  if (at::tracer::impl::is_dispatch_enabled()) return false;
  const c10::DispatchKeySet keys = c10::impl::tls_local_dispatch_key_set().included_;
  return !keys.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) && !t.key_set().has(c10::DispatchKey::Batched) &&
         !t._fw_grad(0).defined();
}

}  // namespace dlk
