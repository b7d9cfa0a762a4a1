#include "python/run.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "ops/dispatched.h"

namespace dlk::python {
namespace {

// at::autocast::is_autocast_enabled, whose header includes half of torch.
bool is_autocast_enabled(at::DeviceType device) {
  return !c10::impl::tls_is_dispatch_key_excluded(device == at::kCUDA ? c10::DispatchKey::AutocastCUDA
                                                                      : c10::DispatchKey::AutocastCPU);
}

}  // namespace

bool is_special_mode(at::DeviceType device) {
  return at::tracer::impl::is_dispatch_enabled() || at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         is_autocast_enabled(device);
}

at::Tensor run_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                     double slope, bool recorded) {
  using Recorded = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, double, bool);
  using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, double);
  static const auto with_gradients = dispatched<Recorded>("dlkernels::_linear_act");
  static const auto forward = dispatched<Forward>("dlkernels::_linear_act_forward");
  return recorded ? with_gradients.call(x, weight, bias, act, slope, false) : forward.call(x, weight, bias, act, slope);
}

at::Tensor run_chain(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
                     double slope, bool recorded) {
  using Recorded = at::Tensor(const at::Tensor&, at::TensorList, const OptionalTensors&, at::IntArrayRef, double);
  using Forward = std::vector<at::Tensor>(const at::Tensor&, at::TensorList, const OptionalTensors&, at::IntArrayRef,
                                          double, at::IntArrayRef);
  static const auto with_gradients = dispatched<Recorded>("dlkernels::_mlp");
  static const auto forward = dispatched<Forward>("dlkernels::_mlp_forward");
  return recorded ? with_gradients.call(x, weights, biases, acts, slope)
                  : forward.call(x, weights, biases, acts, slope, {})[0];
}

at::Tensor run_gated(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                     const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope,
                     bool recorded) {
  using Gated = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                           const OptionalTensor&, int64_t, double);
  static const auto with_gradients = dispatched<Gated>("dlkernels::_linear_glu");
  static const auto forward = dispatched<Gated>("dlkernels::_linear_glu_forward");
  const auto& op = recorded ? with_gradients : forward;
  return op.call(x, weight_gate, weight_up, bias_gate, bias_up, act, slope);
}

at::Tensor run_packed(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                      double slope, bool gate_first, bool recorded) {
  using Packed = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, double, bool);
  static const auto with_gradients = dispatched<Packed>("dlkernels::_linear_glu_packed");
  static const auto forward = dispatched<Packed>("dlkernels::_linear_glu_packed_forward");
  return (recorded ? with_gradients : forward).call(x, weight, bias, act, slope, gate_first);
}

}  // namespace dlk::python
