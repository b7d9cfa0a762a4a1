#include "ops/autograd/linear_glu.h"

#include "kernels/activation.h"
#include "ops/aten.h"
#include "ops/autograd/function.h"
#include "ops/linear_glu.h"

namespace dlk {
namespace {

// The inputs that may need a gradient, in the order of the op.
enum Input { kX, kWeightGate, kWeightUp, kBiasGate, kBiasUp, kInputs };
using Needs = std::array<bool, kInputs>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

bool needs_gate(const Needs& n) { return n[kX] || n[kWeightGate] || n[kBiasGate]; }
bool needs_up(const Needs& n) { return n[kX] || n[kWeightUp] || n[kBiasUp]; }

Three forward_z(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope) {
  using F = Three(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                  int64_t, double);
  static const auto op = dispatched<F>("dlkernels::_linear_glu_forward_z");
  return op.call(x, weight_gate, weight_up, bias_gate, bias_up, act, slope);
}

using Differentiable = GluGradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                    const OptionalTensor&, const OptionalTensor&, int64_t, double, bool, bool, bool,
                                    bool, bool);
Dispatched<Differentiable> differentiable_backward() {
  static const auto op = dispatched<Differentiable>("dlkernels::_linear_glu_differentiable_backward");
  return op;
}

// Its outputs are y and the preactivations gate and up, through which a second derivative returns. Only what the needed
// gradients read is saved: dz_gate = g · up · act'(gate), dz_up = g · act(gate).
struct LinearGlu : Function<LinearGlu> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight_gate,
                               const at::Tensor& weight_up, const OptionalTensor& bias_gate,
                               const OptionalTensor& bias_up, int64_t act, double slope) {
    auto [y, gate, up] = forward_z(x, weight_gate, weight_up, bias_gate, bias_up, act, slope);
    auto requires_grad = [](const OptionalTensor& t) { return t && t->requires_grad(); };
    const Needs needs = {x.requires_grad(), weight_gate.requires_grad(), weight_up.requires_grad(),
                         requires_grad(bias_gate), requires_grad(bias_up)};
    const bool reads_gate = needs_up(needs) || (needs_gate(needs) && static_cast<Act>(act) != Act::none);
    const at::Tensor none;
    ctx->save_for_backward(
        {needs[kWeightGate] || needs[kWeightUp] ? x : none, needs[kX] ? with_its_memory(weight_gate) : none,
         needs[kX] ? with_its_memory(weight_up) : none, reads_gate ? gate : none, needs_gate(needs) ? up : none});
    ctx->set_materialize_grads(false);
    ctx->save("act", act);
    ctx->save("slope", slope);
    ctx->save("bias_gate", bias_gate.has_value());
    ctx->save("bias_up", bias_up.has_value());
    return {y, gate, up};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using F = GluGradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, int64_t, double, bool, bool, bool, bool, bool);
    static const auto op = dispatched<F>("dlkernels::_linear_glu_backward");
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &g = grads[0], &grad_gate = grads[1], &grad_up = grads[2];
    const OptionalTensor x = present(saved[0]), weight_gate = present(saved[1]), weight_up = present(saved[2]),
                         gate = present(saved[3]), up = present(saved[4]);
    const int64_t act = ctx->saved<int64_t>("act");
    const double slope = ctx->saved<double>("slope");
    Needs n{};
    for (size_t i = 0; i < kBiasGate; ++i) n[i] = ctx->needs_input_grad(i);
    // A bias that is None has no place among the inputs.
    const bool has_gate = ctx->saved<bool>("bias_gate"), has_up = ctx->saved<bool>("bias_up");
    n[kBiasGate] = has_gate && ctx->needs_input_grad(kBiasGate);
    n[kBiasUp] = has_up && ctx->needs_input_grad(has_gate ? kBiasUp : kBiasGate);
    const bool in_training = !grad_gate.defined() && !grad_up.defined() && is_opaque_backward(g);
    auto [dx, dweight_gate, dweight_up, dbias_gate, dbias_up] =
        in_training ? op.call(g, x, weight_gate, weight_up, gate, up, act, slope, n[kX], n[kWeightGate], n[kWeightUp],
                              n[kBiasGate], n[kBiasUp])
                    : differentiable_backward().call(present(g), present(grad_gate), present(grad_up), x, weight_gate,
                                                     weight_up, gate, up, act, slope, n[kX], n[kWeightGate],
                                                     n[kWeightUp], n[kBiasGate], n[kBiasUp]);
    if (!has_gate) return {dx, dweight_gate, dweight_up, dbias_up};
    return {dx, dweight_gate, dweight_up, dbias_gate, dbias_up};
  }
};

// The halves of a packed weight, preactivation or gradient along this dimension: the gate's, then up's.
std::array<at::Tensor, 2> halves(const at::Tensor& both, int64_t dim, bool gate_first) {
  if (!both.defined()) return {};
  const int64_t n = both.size(dim) / 2;
  const at::Tensor first = both.narrow(dim, 0, n), second = both.narrow(dim, n, n);
  return gate_first ? std::array{first, second} : std::array{second, first};
}

// The same for packed parameters. So their gradients are made in one, where autograd would join two by a copy.
struct LinearGluPacked : Function<LinearGluPacked> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const OptionalTensor& bias, int64_t act, double slope, bool gate_first) {
    using F = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                                                 double, bool);
    static const auto op = dispatched<F>("dlkernels::_linear_glu_packed_forward_z");
    auto [y, z] = op.call(x, weight, bias, act, slope, gate_first);
    const bool needs_x = x.requires_grad(), needs_weight = weight.requires_grad();
    const at::Tensor none;
    ctx->save_for_backward({needs_weight ? x : none, needs_x ? with_its_memory(weight) : none, z});
    ctx->set_materialize_grads(false);
    ctx->save("act", act);
    ctx->save("slope", slope);
    ctx->save("gate_first", gate_first);
    ctx->save("bias", bias.has_value());
    return {y, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using F = Three(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&, int64_t, double,
                    bool, bool, bool, bool);
    static const auto op = dispatched<F>("dlkernels::_linear_glu_packed_backward");
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &g = grads[0], &grad_z = grads[1], &weight = saved[1], &z = saved[2];
    const OptionalTensor x = present(saved[0]);
    const int64_t act = ctx->saved<int64_t>("act");
    const double slope = ctx->saved<double>("slope");
    const bool gate_first = ctx->saved<bool>("gate_first");
    const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1),
               need_bias = ctx->saved<bool>("bias") && ctx->needs_input_grad(2);
    if (!grad_z.defined() && is_opaque_backward(g)) {
      auto [dx, dweight, dbias] =
          op.call(g, x, present(weight), z, act, slope, gate_first, need_x, need_weight, need_bias);
      return {dx, dweight, dbias};
    }
    const auto [weight_gate, weight_up] = halves(weight, 0, gate_first);
    const auto [gate, up] = halves(z, -1, gate_first);
    const auto [grad_gate, grad_up] = halves(grad_z, -1, gate_first);
    auto [dx, dweight_gate, dweight_up, dbias_gate, dbias_up] = differentiable_backward().call(
        present(g), present(grad_gate), present(grad_up), x, present(weight_gate), present(weight_up), present(gate),
        present(up), act, slope, need_x, need_weight, need_weight, need_bias, need_bias);
    return {dx, joined(dweight_gate, dweight_up, gate_first), joined(dbias_gate, dbias_up, gate_first)};
  }

 private:
  static at::Tensor joined(const at::Tensor& gate, const at::Tensor& up, bool gate_first) {
    if (!gate.defined() && !up.defined()) return gate;
    const at::Tensor of_gate = gate.defined() ? gate : aten::zeros_like(up),
                     of_up = up.defined() ? up : aten::zeros_like(gate);
    return gate_first ? aten::cat({of_gate, of_up}) : aten::cat({of_up, of_gate});
  }
};

}  // namespace

at::Tensor linear_glu(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                      const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope) {
  return LinearGlu::apply(x, weight_gate, weight_up, bias_gate, bias_up, act, slope)[0];
}

at::Tensor linear_glu_packed(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                             double slope, bool gate_first) {
  return LinearGluPacked::apply(x, weight, bias, act, slope, gate_first)[0];
}

}  // namespace dlk
