#include "ops/autograd/mlp.h"

#include <algorithm>

#include "kernels/activation.h"
#include "ops/autograd/derivatives.h"
#include "ops/autograd/function.h"
#include "ops/check.h"

namespace dlk {

std::vector<at::Tensor> call_mlp_forward(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                         at::IntArrayRef acts, double slope, at::IntArrayRef keep) {
  using F = std::vector<at::Tensor>(const at::Tensor&, at::TensorList, const OptionalTensors&, at::IntArrayRef, double,
                                    at::IntArrayRef);
  static const auto op = dispatched<F>("dlkernels::_mlp_forward");
  return op.call(x, weights, biases, acts, slope, keep);
}

std::vector<at::Tensor> call_mlp_backward(const at::Tensor& g, const OptionalTensor& x, const OptionalTensors& weights,
                                          const OptionalTensor& y, at::TensorList kept, at::IntArrayRef keep,
                                          at::IntArrayRef acts, double slope, at::IntArrayRef needs, bool stacked) {
  using F =
      std::vector<at::Tensor>(const at::Tensor&, const OptionalTensor&, const OptionalTensors&, const OptionalTensor&,
                              at::TensorList, at::IntArrayRef, at::IntArrayRef, double, at::IntArrayRef, bool);
  static const auto op = dispatched<F>("dlkernels::_mlp_backward");
  return op.call(g, x, weights, y, kept, keep, acts, slope, needs, stacked);
}

Saves saves_for(at::IntArrayRef acts, at::IntArrayRef needs) {
  const size_t count = acts.size();
  Saves s{needs[1] != 0, false};
  s.keep.assign(count, 0);
  bool reached = needs[0] != 0;  // the layer's input needs a gradient; below, its output does
  for (size_t l = 0; l < count; ++l) {
    if (!reached) ++s.first_weight;
    reached = reached || needs[1 + l] || needs[1 + count + l];
    const Act act = static_cast<Act>(acts[l]);
    const bool is_last = l + 1 == count, reads_h = reached && saves_output(act) && act != Act::none;
    const bool keeps_h = !is_last && (needs[2 + l] || reads_h), keeps_z = reached && !saves_output(act);
    s.keep[l] = kKeepH * keeps_h + kKeepZ * keeps_z + kKeepMask * (!is_last && reached && needs_sign_only(act));
    s.values += keeps_h + keeps_z;
    s.constants += keeps_h && !reached;
    if (is_last) s.y = reads_h;
  }
  return s;
}

namespace {

// The backward in operators that torch sees, layer by layer. `grads` are the gradients of y and of the h and z that forward
// returned. Returns a gradient for each of `needs`, undefined where nothing flows to it.
variable_list backward_layer_by_layer(const variable_list& grads, const Saves& s, const at::Tensor& x,
                                      const variable_list& weights, const at::Tensor& y, at::TensorList kept,
                                      at::IntArrayRef acts, double slope, at::IntArrayRef needs, bool stacked) {
  const size_t count = acts.size();
  variable_list h(count), z(count), grad_h(count), grad_z(count);
  size_t next = 0;
  const auto take = [&](Keep flag, variable_list& values, variable_list& gradients) {
    for (size_t l = 0; l < count; ++l) {
      if (!(s.keep[l] & flag)) continue;
      values[l] = kept[next];
      if (next >= s.constants) gradients[l] = grads[1 + next - s.constants];
      ++next;
    }
  };
  take(kKeepH, h, grad_h);
  take(kKeepZ, z, grad_z);
  h[count - 1] = y;

  variable_list found(needs.size());
  at::Tensor g = grads[0];
  for (size_t l = count; l-- > 0;) {
    bool is_lowest = !needs[0];  // nothing below needs a gradient
    for (size_t below = 0; below < l; ++below) is_lowest = is_lowest && !needs[1 + below] && !needs[1 + count + below];
    const Act act = static_cast<Act>(acts[l]);
    const at::Tensor saved = act == Act::none ? at::Tensor() : saves_output(act) ? h[l] : z[l];
    const auto [dx, dweight, dbias] = backward_in_torch({g,
                                                         grad_z[l],
                                                         l ? h[l - 1] : x,
                                                         weights[l],
                                                         saved,
                                                         {},
                                                         acts[l],
                                                         slope,
                                                         {!is_lowest, needs[1 + l] != 0, needs[1 + count + l] != 0},
                                                         stacked});
    found[1 + l] = dweight;
    found[1 + count + l] = dbias;
    if (is_lowest) break;
    if (l == 0)
      found[0] = dx;
    else
      g = sum_present(dx, grad_h[l - 1]);
  }
  return found;
}

// Its outputs are y and the h and z that forward keeps, for the same reason as z of one layer (autograd/linear_act.cpp).
// `parameters` are the weights and then the biases that are there.
struct Mlp : Function<Mlp> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList parameters,
                               const std::vector<int64_t>& has_bias, at::IntArrayRef acts, double slope) {
    const size_t count = acts.size();
    const at::TensorList weights = parameters.slice(0, count);
    OptionalTensorList biases;
    std::vector<int64_t> needs = {x.requires_grad()};
    for (const at::Tensor& weight : weights) needs.push_back(weight.requires_grad());
    for (size_t l = 0, next = count; l < count; ++l) {
      biases.push_back(has_bias[l] ? OptionalTensor(parameters[next]) : std::nullopt);
      needs.push_back(has_bias[l] && parameters[next].requires_grad());
      next += has_bias[l];
    }
    const Saves s = saves_for(acts, needs);
    std::vector<at::Tensor> made = call_mlp_forward(x, weights, biases, acts, slope, s.keep);
    variable_list saved = {s.x ? x : at::Tensor(), s.y ? made[0] : at::Tensor()};
    for (size_t l = s.first_weight; l < count; ++l) saved.push_back(with_its_memory(weights[l]));
    saved.insert(saved.end(), made.begin() + 1, made.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->save("acts", acts);
    ctx->save("slope", slope);
    ctx->save("has_bias", has_bias);
    ctx->save("needs", needs);
    ctx->save("stacked", weights[0].dim() == 3);
    variable_list outputs = {made[0]};
    outputs.insert(outputs.end(), made.begin() + 1 + s.constants, made.begin() + 1 + s.values);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const std::vector<int64_t> acts = ctx->saved<std::vector<int64_t>>("acts");
    const std::vector<int64_t> has_bias = ctx->saved<std::vector<int64_t>>("has_bias");
    const double slope = ctx->saved<double>("slope");
    const bool stacked = ctx->saved<bool>("stacked");
    const size_t count = acts.size();
    const Saves s = saves_for(acts, ctx->saved<std::vector<int64_t>>("needs"));
    const variable_list tensors = ctx->get_saved_variables();
    variable_list weights(count);
    size_t next = 2;
    for (size_t l = s.first_weight; l < count; ++l) weights[l] = tensors[next++];
    const at::TensorList kept = at::TensorList(tensors).slice(next);

    std::vector<int64_t> needs;
    for (size_t i = 0; i <= count; ++i) needs.push_back(ctx->needs_input_grad(i));
    for (size_t l = 0, edge = 1 + count; l < count; ++l) needs.push_back(has_bias[l] && ctx->needs_input_grad(edge++));

    const auto is_defined = [](const at::Tensor& t) { return t.defined(); };
    variable_list out;
    if (is_opaque_backward(grads[0]) && std::none_of(grads.begin() + 1, grads.end(), is_defined)) {  // in training
      OptionalTensorList given;
      for (const at::Tensor& weight : weights) given.push_back(present(weight));
      const std::vector<at::Tensor> found = call_mlp_backward(grads[0], present(tensors[0]), given, present(tensors[1]),
                                                              kept, s.keep, acts, slope, needs, stacked);
      auto made = found.begin();
      for (const int64_t need : needs) out.push_back(need ? *made++ : at::Tensor());
    } else {
      out = backward_layer_by_layer(grads, s, tensors[0], weights, tensors[1], kept, acts, slope, needs, stacked);
    }
    // One for each tensor that forward was given.
    for (size_t l = count; l-- > 0;)
      if (!has_bias[l]) out.erase(out.begin() + 1 + count + l);
    return out;
  }
};

}  // namespace

at::Tensor mlp(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
               double slope) {
  check_mlp_counts(weights.size(), size_of(biases), acts.size());
  std::vector<at::Tensor> parameters = weights.vec();
  std::vector<int64_t> has_bias;
  for (size_t l = 0; l < weights.size(); ++l) {
    const OptionalTensor bias = get(biases, l);
    has_bias.push_back(bias.has_value());
    if (bias) parameters.push_back(*bias);
  }
  return Mlp::apply(x, at::TensorList(parameters), has_bias, acts, slope)[0];
}

}  // namespace dlk
