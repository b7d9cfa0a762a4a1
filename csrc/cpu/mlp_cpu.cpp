// The CPU ops of a chain of layers. Narrow layers and many rows go through the chain kernels, rows in cache from the
// first layer to the last; others run layer by layer, where each dgrad applies the mask of the layer below.
#include "../mlp.h"

#include <ATen/ops/empty.h>

#include "../activation.h"
#include "layer.h"
#include "route.h"

namespace dlk {
namespace {

using cpu::engine;

bool keeps_z(const Checked& c) { return !saves_output(c.act.kind); }

// What passes between forward and backward, for both ways: outputs h[1] … and pre-activations z, undefined where unused.
struct Activations {
  std::vector<at::Tensor> h, z;
};

int slices_of(const std::vector<Checked>& layers) {
  std::vector<Shape> shapes;
  for (const Checked& c : layers) shapes.push_back(c.shape);
  return cpu::chain_slices(shapes, layers[0].dtype);
}

cpu::Parallel parallel_for(const std::vector<Checked>& layers) {
  int64_t multiplications = 0;
  for (const Checked& c : layers) multiplications += c.shape.m * c.shape.n * c.shape.k;
  return cpu::parallel_for_work(multiplications);
}

std::vector<ChainLayer> chain_layers(const std::vector<Checked>& layers, at::TensorList weights, const Activations& a) {
  auto data = [](const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  std::vector<ChainLayer> out(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    out[l].n = layers[l].shape.n, out[l].k = layers[l].shape.k;
    out[l].weight = view_of(weights[l]);
    out[l].act = layers[l].act;
    out[l].h = data(a.h[l]), out[l].z = data(a.z[l]);
  }
  return out;
}

Chain chain_of(const std::vector<ChainLayer>& layers, const at::Tensor& x2) {
  Chain p{};
  p.rows = x2.size(0);
  p.layers = static_cast<int>(layers.size());
  p.layer = layers.data();
  p.x = view_of(x2);
  return p;
}

}  // namespace

std::vector<at::Tensor> mlp_forward_cpu(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                        at::IntArrayRef acts, double slope, bool keep) {
  const std::vector<Checked> layers = check_mlp(x, weights, biases, acts, slope);
  const size_t count = layers.size();
  const bool as_chain = slices_of(layers) > 0;
  Activations a{std::vector<at::Tensor>(count), std::vector<at::Tensor>(count)};
  std::vector<at::Tensor> bias(count);
  for (size_t l = 0; l < count; ++l) {
    auto make = [&] { return at::empty(resized_last(x, layers[l].shape.n), x.options()); };
    if (const std::optional<at::Tensor> b = biases.get(l)) bias[l] = b->contiguous();
    if (keep || !as_chain || l + 1 == count) a.h[l] = make();
    if (keep && keeps_z(layers[l])) a.z[l] = make();
  }

  if (as_chain) {
    std::vector<ChainLayer> chain = chain_layers(layers, weights, a);
    for (size_t l = 0; l < count; ++l) chain[l].bias = bias[l].defined() ? bias[l].const_data_ptr() : nullptr;
    const at::Tensor x2 = as_rows(x);
    engine(layers[0].dtype).chain_forward(chain_of(chain, x2), parallel_for(layers));
  } else {
    for (size_t l = 0; l < count; ++l)
      cpu::layer_forward(layers[l], l ? a.h[l - 1] : x, weights[l], bias[l], a.h[l],
                         a.z[l].defined() ? &a.z[l] : nullptr);
  }
  std::vector<at::Tensor> out = {a.h.back()};
  if (!keep) return out;
  out.insert(out.end(), a.h.begin(), a.h.end() - 1);
  for (const at::Tensor& z : a.z)
    if (z.defined()) out.push_back(z);
  return out;
}

std::vector<at::Tensor> mlp_backward_cpu(const at::Tensor& grad_y, const at::Tensor& x, at::TensorList weights,
                                         const std::optional<at::Tensor>& y, at::TensorList kept, at::IntArrayRef acts,
                                         double slope, at::IntArrayRef needs) {
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
  size_t expected = count - 1;
  for (const Checked& c : layers) expected += keeps_z(c);
  TORCH_CHECK(kept.size() == expected, "mlp: expected the ", expected, " tensors that forward kept, got ", kept.size());

  Activations a{kept.slice(0, count - 1).vec(), std::vector<at::Tensor>(count)};
  a.h.push_back(y.value_or(at::Tensor()));
  for (size_t l = 0, next = count - 1; l < count; ++l)
    if (keeps_z(layers[l])) a.z[l] = kept[next++];
  std::vector<at::Tensor> grads(needs.size());
  auto need_weight = [&](size_t l) { return needs[1 + l] != 0; };
  auto need_bias = [&](size_t l) { return needs[1 + count + l] != 0; };

  if (const int slices = slices_of(layers)) {
    auto make = [&](size_t i, at::IntArrayRef sizes) { return (grads[i] = at::empty(sizes, x.options())).data_ptr(); };
    std::vector<ChainLayer> chain = chain_layers(layers, weights, a);
    for (size_t l = 0; l < count; ++l) {
      if (need_weight(l)) chain[l].dweight = make(1 + l, {chain[l].n, chain[l].k});
      if (need_bias(l)) chain[l].dbias = make(1 + count + l, {chain[l].n});
    }
    const at::Tensor x2 = as_rows(x), g2 = as_rows(grad_y);
    Chain p = chain_of(chain, x2);
    p.grad_y = view_of(g2);
    p.dx = needs[0] ? make(0, x.sizes()) : nullptr;
    p.slices = slices;
    const at::Tensor partials = accumulators(slices * cpu::chain_parameters(p), x);
    p.partials = partials.data_ptr();
    engine(layers[0].dtype).chain_backward(p, parallel_for(layers));
    return grads;
  }

  auto saved_by = [&](size_t l) {
    return layers[l].act.kind == Act::none ? at::Tensor() : keeps_z(layers[l]) ? a.z[l] : a.h[l];
  };
  size_t deepest = 0;  // the first layer that has a gradient to give
  while (needs[0] == 0 && deepest + 1 < count && !need_weight(deepest) && !need_bias(deepest)) ++deepest;
  Incoming in = {grad_y, saved_by(count - 1)};
  for (size_t l = count; l-- > deepest;) {
    Gate gate;
    if (l > 0) gate = {saved_by(l - 1), layers[l - 1].act};
    const auto [dx, dweight, dbias] =
        cpu::layer_backward(layers[l], in, l ? a.h[l - 1] : x, weights[l], l > deepest || needs[0] != 0, need_weight(l),
                            need_bias(l), gate.saved.defined() ? &gate : nullptr);
    grads[1 + l] = dweight;
    grads[1 + count + l] = dbias;
    if (l == 0) grads[0] = dx;
    in = {dx, gate.applied ? at::Tensor() : gate.saved};
  }
  return grads;
}

}  // namespace dlk
