#include "mlp_host.h"

#include <c10/core/DeviceGuard.h>

#include "activation.h"

namespace dlk {
namespace {

bool keeps_z(const Checked& c) { return !saves_output(c.act.kind); }

// What passes between forward and backward, for both ways: outputs h[1] …, pre-activations z, and of layer by layer masks,
// which dgrad reads of the layer below; undefined where unused.
struct Activations {
  std::vector<at::Tensor> h, z, mask;

  explicit Activations(size_t layers) : h(layers), z(layers), mask(layers) {}
};

bool keeps_mask(const MlpKernels& kernels, const std::vector<Checked>& layers, size_t l, bool as_chain) {
  return !as_chain && l + 1 < layers.size() && kernels.takes_mask(layers[l]);
}

std::vector<ChainLayer> chain_layers(const std::vector<Checked>& layers, at::TensorList weights) {
  std::vector<ChainLayer> out(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    out[l].n = layers[l].shape.n, out[l].k = layers[l].shape.k;
    out[l].weight = view_of(weights[l]);
    out[l].act = layers[l].act;
  }
  return out;
}

void set_activations(std::vector<ChainLayer>& layers, const Activations& a) {
  auto data = [](const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  for (size_t l = 0; l < layers.size(); ++l) layers[l].h = data(a.h[l]), layers[l].z = data(a.z[l]);
}

Chain chain_of(const std::vector<ChainLayer>& layers, int64_t rows) {
  Chain p{};
  p.rows = rows;
  p.layers = static_cast<int>(layers.size());
  p.layer = layers.data();
  return p;
}

}  // namespace

std::vector<at::Tensor> mlp_forward(const MlpKernels& kernels, const at::Tensor& x, at::TensorList weights,
                                    const OptionalTensors& biases, at::IntArrayRef acts, double slope, bool keep) {
  const std::vector<Checked> layers = check_mlp(x, weights, biases, acts, slope);
  const c10::DeviceGuard device(x.device());
  const DType dtype = layers[0].dtype;
  const size_t count = layers.size();
  std::vector<ChainLayer> chain = chain_layers(layers, weights);
  Chain p = chain_of(chain, layers[0].shape.m);
  const bool as_chain = kernels.takes(p, dtype);
  Activations a(count);
  std::vector<at::Tensor> bias(count);
  for (size_t l = 0; l < count; ++l) {
    const int64_t n = layers[l].shape.n;
    auto make = [&] { return at::empty(resized_last(x, n), x.options()); };
    if (const std::optional<at::Tensor> b = biases.get(l)) bias[l] = b->contiguous();
    if (keep || !as_chain || l + 1 == count) a.h[l] = make();
    if (keep && keeps_z(layers[l])) a.z[l] = make();
    if (keep && keeps_mask(kernels, layers, l, as_chain))
      a.mask[l] = at::empty(resized_last(x, n / kMaskBits), x.options().dtype(at::kByte));
  }

  if (as_chain) {
    set_activations(chain, a);
    for (size_t l = 0; l < count; ++l) chain[l].bias = bias[l].defined() ? bias[l].const_data_ptr() : nullptr;
    const at::Tensor x2 = as_rows(x);
    p.x = view_of(x2);
    kernels.chain_forward(p, dtype);
  } else {
    for (size_t l = 0; l < count; ++l)
      kernels.layer_forward(layers[l], l ? a.h[l - 1] : x, weights[l], bias[l], {a.h[l], a.z[l], a.mask[l]});
  }
  std::vector<at::Tensor> out = {a.h.back()};
  if (!keep) return out;
  out.insert(out.end(), a.h.begin(), a.h.end() - 1);
  for (const std::vector<at::Tensor>& more : {a.z, a.mask})
    for (const at::Tensor& t : more)
      if (t.defined()) out.push_back(t);
  return out;
}

std::vector<at::Tensor> mlp_backward(const MlpKernels& kernels, const at::Tensor& grad_y, const at::Tensor& x,
                                     at::TensorList weights, const std::optional<at::Tensor>& y, at::TensorList kept,
                                     at::IntArrayRef acts, double slope, at::IntArrayRef needs) {
  const std::vector<Checked> layers =
      check_mlp(x, weights, OptionalTensors(std::vector<std::optional<at::Tensor>>(weights.size())), acts, slope);
  const size_t count = layers.size();
  const Checked& last = layers.back();
  check_like(grad_y, "grad_y", x, "x", "mlp");
  const std::vector<int64_t> y_sizes = resized_last(x, last.shape.n);
  TORCH_CHECK(grad_y.sizes() == at::IntArrayRef(y_sizes), "mlp: grad_y must have y's shape ", y_sizes, ", got ",
              grad_y.sizes());
  TORCH_CHECK(needs.size() == 1 + 2 * count, "mlp: expected ", 1 + 2 * count, " entries in needs, got ", needs.size());
  TORCH_CHECK(y || keeps_z(last) || last.act.kind == Act::none, "mlp: the last layer's gradient reads y, got None");
  std::vector<ChainLayer> chain = chain_layers(layers, weights);
  Chain p = chain_of(chain, layers[0].shape.m);
  const c10::DeviceGuard device(x.device());
  const DType dtype = layers[0].dtype;
  const bool as_chain = kernels.takes(p, dtype);
  size_t expected = count - 1;
  for (size_t l = 0; l < count; ++l) expected += keeps_z(layers[l]) + keeps_mask(kernels, layers, l, as_chain);
  TORCH_CHECK(kept.size() == expected, "mlp: expected the ", expected, " tensors that forward kept, got ", kept.size());

  // What was kept may come back otherwise than it was, through hooks for saved tensors: the kernels read it as it was.
  auto as_kept = [&](const at::Tensor& t, size_t l, bool mask = false) {
    check_place(t, "what forward kept", x, "x", "mlp");
    const at::ScalarType dtype = mask ? at::kByte : x.scalar_type();
    const std::vector<int64_t> sizes = resized_last(x, layers[l].shape.n / (mask ? kMaskBits : 1));
    TORCH_CHECK(t.scalar_type() == dtype && t.sizes() == at::IntArrayRef(sizes), "mlp: expected of layer ", l,
                " what forward kept, ", dtype, " ", at::IntArrayRef(sizes), ", got ", t.scalar_type(), " ", t.sizes());
    return t.contiguous();
  };
  Activations a(count);
  for (size_t l = 0; l + 1 < count; ++l) a.h[l] = as_kept(kept[l], l);
  if (y) a.h[count - 1] = as_kept(*y, count - 1);
  size_t next = count - 1;
  for (size_t l = 0; l < count; ++l)
    if (keeps_z(layers[l])) a.z[l] = as_kept(kept[next++], l);
  for (size_t l = 0; l < count; ++l)
    if (keeps_mask(kernels, layers, l, as_chain)) a.mask[l] = as_kept(kept[next++], l, true);
  std::vector<at::Tensor> grads(needs.size());
  auto need_weight = [&](size_t l) { return needs[1 + l] != 0; };
  auto need_bias = [&](size_t l) { return needs[1 + count + l] != 0; };

  if (as_chain) {
    auto make = [&](size_t i, at::IntArrayRef sizes) { return (grads[i] = at::empty(sizes, x.options())).data_ptr(); };
    set_activations(chain, a);
    for (size_t l = 0; l < count; ++l) {
      if (need_weight(l)) chain[l].dweight = make(1 + l, {chain[l].n, chain[l].k});
      if (need_bias(l)) chain[l].dbias = make(1 + count + l, {chain[l].n});
    }
    const at::Tensor x2 = as_rows(x), g2 = as_rows(grad_y);
    p.x = view_of(x2);
    p.grad_y = view_of(g2);
    p.dx = needs[0] ? make(0, x.sizes()) : nullptr;
    kernels.chain_backward(p, dtype, x);
    return grads;
  }

  auto saved_by = [&](size_t l) {
    if (a.mask[l].defined()) return a.mask[l];
    return layers[l].act.kind == Act::none ? at::Tensor() : keeps_z(layers[l]) ? a.z[l] : a.h[l];
  };
  size_t deepest = 0;  // the first layer that has a gradient to give
  while (needs[0] == 0 && deepest + 1 < count && !need_weight(deepest) && !need_bias(deepest)) ++deepest;
  Incoming in = {grad_y, saved_by(count - 1)};
  at::Tensor dbias_above;  // of this layer, summed by the dgrad of the layer above
  for (size_t l = count; l-- > deepest;) {
    Gate gate;
    if (l > 0) {
      gate = {saved_by(l - 1), layers[l - 1].act};
      if (kernels.dgrad_sums_dbias && need_bias(l - 1)) gate.dbias = at::empty({layers[l - 1].shape.n}, x.options());
    }
    const bool summed = dbias_above.defined();
    const auto [dx, dweight, dbias] =
        kernels.layer_backward(layers[l], in, l ? a.h[l - 1] : x, weights[l], l > deepest || needs[0] != 0,
                               need_weight(l), need_bias(l) && !summed, gate.saved.defined() ? &gate : nullptr);
    grads[1 + l] = dweight;
    grads[1 + count + l] = summed ? dbias_above : dbias;
    if (l == 0) grads[0] = dx;
    in = {dx, gate.applied ? at::Tensor() : gate.saved};
    dbias_above = gate.summed ? gate.dbias : at::Tensor();
  }
  return grads;
}

}  // namespace dlk
