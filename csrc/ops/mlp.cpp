#include "ops/mlp.h"

#include <ATen/core/List.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "kernels/activation.h"
#include "ops/check.h"
#include "ops/layer.h"

namespace dlk {
namespace {

// The tensors that pass from forward to backward: outputs h[1] …, pre-activations z and, where layers run one by one, masks,
// which dgrad reads for the layer below. Undefined where unused.
struct Activations {
  std::vector<at::Tensor> h, z, mask;

  explicit Activations(size_t layers) : h(layers), z(layers), mask(layers) {}
};

FusedMlpLayer fused_mlp_layer(const Problem& layer, const at::Tensor& weight, const at::Tensor& h,
                              const at::Tensor& z) {
  FusedMlpLayer out{};
  out.n = layer.shape.n, out.k = layer.shape.k;
  out.act = layer.act;
  if (weight.defined()) out.weight = view_of(weight);
  out.h = data_or_null(h), out.z = data_or_null(z);
  return out;
}

FusedMlp fused_mlp_of(const std::vector<FusedMlpLayer>& layers, int64_t rows) {
  FusedMlp p{};
  p.rows = rows;
  p.layers = static_cast<int>(layers.size());
  p.layer = layers.data();
  return p;
}

}  // namespace

std::vector<at::Tensor> mlp_forward(const Device& device, const at::Tensor& x, at::TensorList weights,
                                    const OptionalTensors& biases, at::IntArrayRef acts, double slope,
                                    at::IntArrayRef keep) {
  const std::vector<Problem> layers = check_mlp(x, weights, biases, acts, slope);
  const c10::DeviceGuard guard(x.device());
  const DType dtype = layers[0].dtype;
  const size_t count = layers.size();
  TORCH_CHECK(keep.empty() || keep.size() == count, "mlp: expected ", count, " entries in keep, or none, got ",
              keep.size());
  auto keeps = [&](size_t l, Keep what) { return !keep.empty() && (keep[l] & what) != 0; };
  std::vector<FusedMlpLayer> chain;
  for (size_t l = 0; l < count; ++l) chain.push_back(fused_mlp_layer(layers[l], weights[l], {}, {}));
  FusedMlp p = fused_mlp_of(chain, layers[0].shape.m);
  const bool as_fused_mlp = device.takes_fused_mlp(p, dtype);
  Activations a(count);
  std::vector<at::Tensor> bias(count);
  for (size_t l = 0; l < count; ++l) {
    const int64_t n = layers[l].shape.n;
    auto make = [&] { return new_empty(resized_last(x, n), x.options()); };
    if (const std::optional<at::Tensor> b = biases.get(l)) bias[l] = b->contiguous();
    if (keeps(l, kKeepH) || !as_fused_mlp || l + 1 == count) a.h[l] = make();
    if (keeps(l, kKeepZ)) a.z[l] = make();
    if (keeps(l, kKeepMask) && !as_fused_mlp && device.takes_mask(layers[l]))
      a.mask[l] = new_empty(resized_last(x, n / kMaskBits), x.options().dtype(at::kByte));
  }

  if (as_fused_mlp) {
    for (size_t l = 0; l < count; ++l) {
      chain[l] = fused_mlp_layer(layers[l], weights[l], a.h[l], a.z[l]);
      chain[l].bias = bias[l].defined() ? bias[l].const_data_ptr() : nullptr;
    }
    const at::Tensor x2 = as_rows(x);
    p.x = view_of(x2);
    device.fused_mlp_forward(p, dtype);
  } else {
    for (size_t l = 0; l < count; ++l)
      layer_forward(device, layers[l], l ? a.h[l - 1] : x, weights[l], bias[l], {a.h[l], a.z[l], a.mask[l]});
  }
  std::vector<at::Tensor> out = {a.h.back()};
  for (size_t l = 0; l + 1 < count; ++l)
    if (keeps(l, kKeepH)) out.push_back(a.h[l]);
  for (const std::vector<at::Tensor>& more : {a.z, a.mask})
    for (const at::Tensor& t : more)
      if (t.defined()) out.push_back(t);
  return out;
}

std::vector<at::Tensor> mlp_backward(const Device& device, const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                                     const OptionalTensors& weights, const std::optional<at::Tensor>& y,
                                     at::TensorList kept, at::IntArrayRef keep, at::IntArrayRef acts, double slope,
                                     at::IntArrayRef needs) {
  const size_t count = weights.size();
  TORCH_CHECK(count > 0 && acts.size() == count && keep.size() == count && needs.size() == 1 + 2 * count,
              "mlp: expected for each of ", count,
              " weights an activation, an entry in keep and two in needs, after x's; ", "got ", acts.size(), ", ",
              keep.size(), " and ", needs.size());
  check_layout(grad_y, "grad_y", "mlp");
  const DType dtype = dtype_of(grad_y, "mlp");
  TORCH_CHECK(grad_y.dim() >= 1, "mlp: grad_y must be [..., out_features], got a 0-dimensional tensor");
  const c10::DeviceGuard guard(grad_y.device());
  const bool need_x = needs[0] != 0;
  auto need_weight = [&](size_t l) { return needs[1 + l] != 0; };
  auto need_bias = [&](size_t l) { return needs[1 + count + l] != 0; };
  size_t deepest = 0;  // the first layer that has a gradient to give: those below it are not looked at
  while (!need_x && deepest + 1 < count && !need_weight(deepest) && !need_bias(deepest)) ++deepest;
  auto need_input = [&](size_t l) { return l > deepest || need_x; };  // its gradient

  // Tensors with grad_y's rows. Hooks for saved tensors may change strides; the kernels read them as forward wrote them,
  // contiguous.
  auto check_rows = [&](const at::Tensor& t, size_t l, const char* name, int64_t features, bool mask = false) {
    TORCH_CHECK(t.defined(), "mlp: expected of layer ", l, " ", name, ", which these gradients read, got None");
    check_place(t, name, grad_y, "grad_y", "mlp");
    const at::ScalarType type = mask ? at::kByte : grad_y.scalar_type();
    const std::vector<int64_t> sizes = resized_last(grad_y, features);
    TORCH_CHECK(t.scalar_type() == type && t.sizes() == at::IntArrayRef(sizes), "mlp: expected of layer ", l, " ", name,
                ", ", type, " ", at::IntArrayRef(sizes), ", got ", t.scalar_type(), " ", t.sizes());
  };

  Activations a(count);
  const auto asked = [&](Keep what) {
    return std::count_if(keep.begin(), keep.end(), [&](int64_t k) { return (k & what) != 0; });
  };
  const size_t values = asked(kKeepH) + asked(kKeepZ);
  TORCH_CHECK(kept.size() >= values, "mlp: expected the ", values, " tensors that forward kept, got ", kept.size());
  size_t next = 0, last_mask = kept.size();
  for (size_t l = 0; l < count; ++l)
    if (keep[l] & kKeepH) a.h[l] = kept[next++].contiguous();
  for (size_t l = 0; l < count; ++l)
    if (keep[l] & kKeepZ) a.z[l] = kept[next++].contiguous();
  if (y) a.h[count - 1] = y->contiguous();

  // Problem from the top down, where a layer's outputs are known.
  std::vector<Problem> layers(count);
  std::vector<at::Tensor> weight(count), input(count);
  Shape shape{rows_of(grad_y), 0, grad_y.size(-1)};
  for (size_t l = count; l-- > deepest;) {
    shape = {shape.m, shape.k, 0};
    if (need_input(l)) {
      weight[l] = weights.get(l).value_or(at::Tensor());
      TORCH_CHECK(weight[l].defined(), "mlp: expected weights[", l, "] for these gradients, got None");
      check_like(weight[l], "a weight", grad_y, "grad_y", "mlp");
      TORCH_CHECK(weight[l].dim() == 2 && weight[l].size(0) == shape.n, "mlp: weights[", l,
                  "] must be [out_features, in_features] with out_features = ", shape.n, ", got ", weight[l].sizes());
      shape.k = weight[l].size(1);
    }
    if (need_weight(l)) {
      input[l] = l > 0 ? a.h[l - 1] : x.value_or(at::Tensor());
      if (!need_input(l) && input[l].defined() && input[l].dim() > 0) shape.k = input[l].size(-1);
      check_rows(input[l], l, "the input", shape.k);
    }
    layers[l] = {shape, dtype, check_activation(acts[l], slope, "mlp")};
    if ((keep[l] & kKeepMask) && last_mask > values && device.takes_mask(layers[l]))
      a.mask[l] = kept[--last_mask].contiguous();
  }
  for (size_t l = deepest; l < count; ++l) {
    const auto& [own, type, act, casts] = layers[l];
    const char* name = "what forward kept";
    if (act.kind != Act::none) check_rows(saves_output(act.kind) ? a.h[l] : a.z[l], l, name, own.n);
    if (a.mask[l].defined()) check_rows(a.mask[l], l, name, own.n / kMaskBits, true);
  }

  std::vector<FusedMlpLayer> chain;
  for (size_t l = deepest; l < count; ++l) chain.push_back(fused_mlp_layer(layers[l], weight[l], a.h[l], a.z[l]));
  FusedMlp p = fused_mlp_of(chain, shape.m);
  std::vector<at::Tensor> grads(needs.size());
  if (device.takes_fused_mlp(p, dtype)) {
    const at::TensorOptions options = grad_y.options();
    auto make = [&](size_t i, at::IntArrayRef sizes) { return (grads[i] = new_empty(sizes, options)).data_ptr(); };
    for (size_t l = deepest; l < count; ++l) {
      FusedMlpLayer& layer = chain[l - deepest];
      if (need_weight(l)) layer.dweight = make(1 + l, {layer.n, layer.k});
      if (need_bias(l)) layer.dbias = make(1 + count + l, {layer.n});
    }
    const at::Tensor x2 = need_weight(deepest) ? as_rows(input[deepest]) : at::Tensor(), g2 = as_rows(grad_y);
    if (x2.defined()) p.x = view_of(x2);
    p.grad_y = view_of(g2);
    p.dx = need_x ? make(0, resized_last(grad_y, shape.k)) : nullptr;
    device.fused_mlp_backward(p, dtype, grad_y);
  } else {
    auto saved_by = [&](size_t l) {
      if (a.mask[l].defined()) return a.mask[l];
      const Act kind = layers[l].act.kind;
      return kind == Act::none ? at::Tensor() : saves_output(kind) ? a.h[l] : a.z[l];
    };
    OutputGrad in = {grad_y, saved_by(count - 1)};
    at::Tensor dbias;  // of this layer, where dgrad of the layer above summed it
    for (size_t l = count; l-- > deepest;) {
      BackwardEpilogue below{};
      if (l > deepest) below = {saved_by(l - 1), layers[l - 1].act, need_bias(l - 1)};
      const auto made = new_gradients(layers[l].shape, in.g, grad_y.scalar_type(), grad_y.scalar_type(), need_input(l),
                                      need_weight(l), need_bias(l) && !dbias.defined());
      layer_backward(device, layers[l], in, input[l], weight[l], made, &below);
      grads[1 + l] = std::get<1>(made);
      grads[1 + count + l] = dbias.defined() ? dbias : std::get<2>(made);
      if (l == 0) grads[0] = std::get<0>(made);
      in = {std::get<0>(made), below.applied ? at::Tensor() : below.saved};
      dbias = below.dbias;
    }
  }
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < needs.size(); ++i)
    if (needs[i]) out.push_back(grads[i]);
  return out;
}

}  // namespace dlk
