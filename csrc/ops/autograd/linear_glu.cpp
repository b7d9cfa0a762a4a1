#include "ops/autograd/linear_glu.h"

#include "kernels/activation.h"
#include "ops/autograd/function.h"
#include "ops/linear_glu.h"

namespace dlk {
namespace {

// The inputs that may need a gradient, in the order of the op.
enum Input { kX, kWeightGate, kWeightUp, kBiasGate, kBiasUp, kInputs };
using Needs = std::array<bool, kInputs>;

bool needs_gate(const Needs& n) { return n[kX] || n[kWeightGate] || n[kBiasGate]; }
bool needs_up(const Needs& n) { return n[kX] || n[kWeightUp] || n[kBiasUp]; }

// Its outputs are y and the preactivations gate and up, through which a second derivative returns. Only what the needed
// gradients read is saved: dz_gate = g · up · act'(gate), dz_up = g · act(gate).
struct LinearGlu : torch::autograd::Function<LinearGlu> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight_gate,
                               const at::Tensor& weight_up, const OptionalTensor& bias_gate,
                               const OptionalTensor& bias_up, int64_t act, double slope) {
    using F =
        std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                       const OptionalTensor&, const OptionalTensor&, int64_t, double);
    static const auto op = dispatched<F>("dlkernels::_linear_glu_forward_z");
    auto [y, gate, up] = op.call(x, weight_gate, weight_up, bias_gate, bias_up, act, slope);
    auto requires_grad = [](const OptionalTensor& t) { return t && t->requires_grad(); };
    const Needs needs = {x.requires_grad(), weight_gate.requires_grad(), weight_up.requires_grad(),
                         requires_grad(bias_gate), requires_grad(bias_up)};
    const bool reads_gate = needs_up(needs) || (needs_gate(needs) && static_cast<Act>(act) != Act::none);
    const at::Tensor none;
    ctx->save_for_backward(
        {needs[kWeightGate] || needs[kWeightUp] ? x : none, needs[kX] ? with_its_memory(weight_gate) : none,
         needs[kX] ? with_its_memory(weight_up) : none, reads_gate ? gate : none, needs_gate(needs) ? up : none});
    ctx->set_materialize_grads(false);
    ctx->saved_data["act"] = act;
    ctx->saved_data["slope"] = slope;
    ctx->saved_data["bias_gate"] = bias_gate.has_value();
    ctx->saved_data["bias_up"] = bias_up.has_value();
    return {y, gate, up};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using F = GluGradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, int64_t, double, bool, bool, bool, bool, bool);
    using Differentiable =
        GluGradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     int64_t, double, bool, bool, bool, bool, bool);
    static const auto op = dispatched<F>("dlkernels::_linear_glu_backward");
    static const auto differentiable = dispatched<Differentiable>("dlkernels::_linear_glu_differentiable_backward");
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &g = grads[0], &grad_gate = grads[1], &grad_up = grads[2];
    const OptionalTensor x = present(saved[0]), weight_gate = present(saved[1]), weight_up = present(saved[2]),
                         gate = present(saved[3]), up = present(saved[4]);
    const int64_t act = ctx->saved_data["act"].toInt();
    const double slope = ctx->saved_data["slope"].toDouble();
    Needs n{};
    for (size_t i = 0; i < kBiasGate; ++i) n[i] = ctx->needs_input_grad(i);
    // A bias that is None has no place among the inputs.
    const bool has_gate = ctx->saved_data["bias_gate"].toBool(), has_up = ctx->saved_data["bias_up"].toBool();
    n[kBiasGate] = has_gate && ctx->needs_input_grad(kBiasGate);
    n[kBiasUp] = has_up && ctx->needs_input_grad(has_gate ? kBiasUp : kBiasGate);
    const bool in_training = !grad_gate.defined() && !grad_up.defined() && is_opaque_backward(g);
    auto [dx, dweight_gate, dweight_up, dbias_gate, dbias_up] =
        in_training
            ? op.call(g, x, weight_gate, weight_up, gate, up, act, slope, n[kX], n[kWeightGate], n[kWeightUp],
                      n[kBiasGate], n[kBiasUp])
            : differentiable.call(present(g), present(grad_gate), present(grad_up), x, weight_gate, weight_up, gate, up,
                                  act, slope, n[kX], n[kWeightGate], n[kWeightUp], n[kBiasGate], n[kBiasUp]);
    return {dx, dweight_gate, dweight_up, dbias_gate, dbias_up, {}, {}};
  }
};

}  // namespace

at::Tensor linear_glu(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                      const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope) {
  return LinearGlu::apply(x, weight_gate, weight_up, bias_gate, bias_up, act, slope)[0];
}

}  // namespace dlk
