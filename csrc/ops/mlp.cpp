#include "ops/mlp.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <utility>

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

using Tensors = std::vector<at::Tensor>;

// Gives what a member of an ensemble writes its own tensors. Kernels of the CPU write to parts of a stacked tensor. Those of
// CUDA need tensors that begin where wide accesses may: they get new ones, which put() copies.
class MemberOutputs {
 public:
  explicit MemberOutputs(int64_t member) : member_(member) {}

  at::Tensor of(const at::Tensor& all) {
    const at::Tensor mine = member_of(all, member_);
    if (!mine.defined() || mine.is_cpu()) return mine;
    made_.emplace_back(mine, new_empty(mine.sizes(), mine.options()));
    return made_.back().second;
  }
  Tensors of(const Tensors& all) {
    Tensors out;
    for (const at::Tensor& t : all) out.push_back(of(t));
    return out;
  }
  void put() const {
    for (const auto& [to, from] : made_) to.copy_(from);
  }

 private:
  int64_t member_;
  std::vector<std::pair<at::Tensor, at::Tensor>> made_;
};

Tensors members_of(const Tensors& all, int64_t e) {
  Tensors out;
  for (const at::Tensor& t : all) out.push_back(member_of(t, e));
  return out;
}

Activations members_of(const Activations& all, int64_t e) {
  Activations out(0);
  out.h = members_of(all.h, e), out.z = members_of(all.z, e), out.mask = members_of(all.mask, e);
  return out;
}

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

// Sizes of the layers from `deepest` on.
std::vector<Shape> shapes_of(const std::vector<Problem>& layers, size_t deepest = 0) {
  std::vector<Shape> shapes;
  for (size_t l = deepest; l < layers.size(); ++l) shapes.push_back(layers[l].shape);
  return shapes;
}

// ---- one chain: a call's own, or a member's ------------------------------------------------------------------------

void run_fused_forward(const Device& device, const std::vector<Problem>& layers, const at::Tensor& x,
                       const Tensors& weights, const Tensors& biases, const Activations& a) {
  std::vector<FusedMlpLayer> chain;
  for (size_t l = 0; l < layers.size(); ++l) {
    chain.push_back(fused_mlp_layer(layers[l], weights[l], a.h[l], a.z[l]));
    chain[l].bias = const_data_or_null(biases[l]);
  }
  FusedMlp p = fused_mlp_of(chain, layers[0].shape.m);
  const at::Tensor x2 = as_rows(x);
  p.x = view_of(x2);
  device.fused_mlp_forward(p, layers[0].dtype);
}

// Fills the activations that are defined; the last h is. `fused`: as one kernel.
void run_forward(const Device& device, const std::vector<Problem>& layers, bool fused, const at::Tensor& x,
                 const Tensors& weights, const Tensors& biases, Activations a) {
  if (fused) return run_fused_forward(device, layers, x, weights, biases, a);
  at::Tensor input = x;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (!a.h[l].defined()) a.h[l] = new_empty({layers[l].shape.m, layers[l].shape.n}, x.options());
    layer_forward(device, layers[l], input, weights[l], biases[l], {a.h[l], a.z[l], a.mask[l]});
    input = std::exchange(a.h[l], {});  // the last one that holds it, unless it is kept
  }
}

// The tensors that a backward reads and writes, for all layers. Layers below `deepest` need no gradient. `slices`: in which
// one kernel cuts the rows; 0: the layers run one by one.
struct Backward {
  const std::vector<Problem>& layers;
  size_t deepest;
  int slices;
  at::Tensor grad_y;
  Tensors input, weight;
  Activations a;
  Tensors grads;  // [dx, dweight_0 ..., dbias_0 ...]; undefined where not wanted
  const GradientUser* user = nullptr;

  void finish(size_t l) const {
    if (user) user->use(l, grads[1 + l], grads[1 + layers.size() + l]);
  }
  bool need_input(size_t l) const { return l > deepest || grads[0].defined(); }
};

void run_fused_backward(const Device& device, const Backward& b) {
  const size_t count = b.layers.size();
  std::vector<FusedMlpLayer> chain;
  for (size_t l = b.deepest; l < count; ++l) {
    chain.push_back(fused_mlp_layer(b.layers[l], b.weight[l], b.a.h[l], b.a.z[l]));
    chain.back().dweight = data_or_null(b.grads[1 + l]);
    chain.back().dbias = data_or_null(b.grads[1 + count + l]);
  }
  FusedMlp p = fused_mlp_of(chain, b.layers.back().shape.m);
  p.slices = b.slices;
  const at::Tensor x2 = b.grads[1 + b.deepest].defined() ? as_rows(b.input[b.deepest]) : at::Tensor();
  const at::Tensor g2 = as_rows(b.grad_y);
  if (x2.defined()) p.x = view_of(x2);
  p.grad_y = view_of(g2);
  p.dx = data_or_null(b.grads[0]);
  device.fused_mlp_backward(p, b.layers[b.deepest].dtype, b.grad_y);
  for (size_t l = count; l-- > b.deepest;) b.finish(l);
}

void run_backward(const Device& device, const Backward& b) {
  if (b.slices > 0) return run_fused_backward(device, b);
  const size_t count = b.layers.size();
  auto saved_by = [&](size_t l) {
    if (b.a.mask[l].defined()) return b.a.mask[l];
    const Act kind = b.layers[l].act.kind;
    return kind == Act::none ? at::Tensor() : saves_output(kind) ? b.a.h[l] : b.a.z[l];
  };
  OutputGrad in = {as_rows(b.grad_y), saved_by(count - 1)};
  bool has_dbias = false;  // dgrad of the layer above summed it
  for (size_t l = count; l-- > b.deepest;) {
    BackwardEpilogue below{};
    if (l > b.deepest) below = {saved_by(l - 1), b.layers[l - 1].act, b.grads[count + l]};
    at::Tensor dx = l == 0 ? b.grads[0] : at::Tensor();
    if (l > 0 && b.need_input(l))
      dx = std::get<0>(
          new_gradients(b.layers[l].shape, in.g, in.g.scalar_type(), in.g.scalar_type(), true, false, false));
    layer_backward(device, b.layers[l], in, b.input[l], b.weight[l],
                   {dx, b.grads[1 + l], has_dbias ? at::Tensor() : b.grads[1 + count + l]}, &below);
    b.finish(l);
    in = {dx, below.applied ? at::Tensor() : below.saved};
    has_dbias = below.summed_dbias;
  }
}

// Makes dweight of one layer after the other in the memory of the largest.
class SharedGradient {
 public:
  SharedGradient(const std::vector<Problem>& layers, size_t deepest, const at::TensorOptions& options) {
    int64_t most = 0;
    for (size_t l = deepest; l < layers.size(); ++l) most = std::max(most, layers[l].shape.n * layers[l].shape.k);
    memory_ = new_empty({1, most}, options);
  }
  at::Tensor dweight(const Shape& s) const {
    at::Tensor t = member_of(memory_, 0);
    t.unsafeGetTensorImpl()->set_sizes_contiguous({s.n, s.k});
    return t;
  }

 private:
  at::Tensor memory_;
};

Tensors backward(const Device& device, const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                 const OptionalTensors& weights, const std::optional<at::Tensor>& y, at::TensorList kept,
                 at::IntArrayRef keep, at::IntArrayRef acts, double slope, at::IntArrayRef needs, bool stacked,
                 const GradientUser* user);

}  // namespace

std::vector<at::Tensor> mlp_forward(const Device& device, const at::Tensor& x, at::TensorList weights,
                                    const OptionalTensors& biases, at::IntArrayRef acts, double slope,
                                    at::IntArrayRef keep) {
  const std::vector<Problem> layers = check_mlp(x, weights, biases, acts, slope);
  const c10::DeviceGuard guard(x.device());
  const size_t count = layers.size();
  const bool stacked = weights[0].dim() == 3;
  TORCH_CHECK(keep.empty() || keep.size() == count, "mlp: expected ", count, " entries in keep, or none, got ",
              keep.size());
  auto keeps = [&](size_t l, Keep what) { return !keep.empty() && (keep[l] & what) != 0; };
  Activations a(count);
  Tensors bias(count);
  bool keeps_mask = false;
  for (size_t l = 0; l < count; ++l) {
    const int64_t n = layers[l].shape.n;
    auto make = [&] { return new_empty(resized_last(x, n), x.options()); };
    if (const std::optional<at::Tensor> b = get(biases, l)) bias[l] = b->contiguous();
    if (keeps(l, kKeepH) || l + 1 == count) a.h[l] = make();
    if (keeps(l, kKeepZ)) a.z[l] = make();
    keeps_mask = keeps_mask || (keeps(l, kKeepMask) && !stacked && device.takes_mask(layers[l]));
  }
  // The table of routes may change while this runs, so each direction is asked once.
  const std::vector<Shape> shapes = shapes_of(layers);
  const bool fused = device.mlp_route(Direction::forward, shapes, layers[0].dtype).slices > 0;
  // A backward as one kernel reads no masks.
  if (keeps_mask && !fused && device.mlp_route(Direction::backward, shapes, layers[0].dtype).slices == 0)
    for (size_t l = 0; l < count; ++l)
      if (keeps(l, kKeepMask) && device.takes_mask(layers[l]))
        a.mask[l] = new_empty(resized_last(x, layers[l].shape.n / kMaskBits), x.options().dtype(at::kByte));

  if (stacked) {
    const Tensors weight = weights.vec();
    device.each_member(x.size(0), layers, [&](int64_t e) {
      MemberOutputs outputs(e);
      Activations mine(0);
      mine.h = outputs.of(a.h), mine.z = outputs.of(a.z), mine.mask.resize(count);
      run_forward(device, layers, fused, member_of(x, e), members_of(weight, e), members_of(bias, e), mine);
      outputs.put();
    });
  } else {
    run_forward(device, layers, fused, x, weights.vec(), bias, a);
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
                                     at::IntArrayRef needs, bool stacked) {
  return backward(device, grad_y, x, weights, y, kept, keep, acts, slope, needs, stacked, nullptr);
}

std::vector<at::Tensor> mlp_backward_for(const Device& device, const GradientUser& user, const at::Tensor& grad_y,
                                         const std::optional<at::Tensor>& x, const OptionalTensors& weights,
                                         const std::optional<at::Tensor>& y, at::TensorList kept, at::IntArrayRef keep,
                                         at::IntArrayRef acts, double slope, at::IntArrayRef needs) {
  return backward(device, grad_y, x, weights, y, kept, keep, acts, slope, needs, false, &user);
}

namespace {

Tensors backward(const Device& device, const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                 const OptionalTensors& weights, const std::optional<at::Tensor>& y, at::TensorList kept,
                 at::IntArrayRef keep, at::IntArrayRef acts, double slope, at::IntArrayRef needs, bool stacked,
                 const GradientUser* user) {
  const size_t count = size_of(weights);
  TORCH_CHECK(count > 0 && acts.size() == count && keep.size() == count && needs.size() == 1 + 2 * count,
              "mlp: expected for each of ", count,
              " weights an activation, an entry in keep and two in needs, after x's; ", "got ", acts.size(), ", ",
              keep.size(), " and ", needs.size());
  check_layout(grad_y, "grad_y", "mlp");
  const DType dtype = dtype_of(grad_y, "mlp");
  TORCH_CHECK(grad_y.dim() >= 1, "mlp: grad_y must be [..., out_features], got a 0-dimensional tensor");
  TORCH_CHECK(!stacked || grad_y.dim() == 3, "mlp: grad_y of an ensemble must be [members, rows, out_features], got ",
              grad_y.sizes());
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
  Shape shape{stacked ? grad_y.size(1) : rows_of(grad_y), 0, grad_y.size(-1)};
  for (size_t l = count; l-- > deepest;) {
    shape = {shape.m, shape.k, 0};
    if (need_input(l)) {
      weight[l] = get(weights, l).value_or(at::Tensor());
      TORCH_CHECK(weight[l].defined(), "mlp: expected weights[", l, "] for these gradients, got None");
      check_like(weight[l], "a weight", grad_y, "grad_y", "mlp");
      const int64_t d = stacked;  // dimensions before out_features
      TORCH_CHECK(
          weight[l].dim() == 2 + d && weight[l].size(d) == shape.n && (!stacked || weight[l].size(0) == grad_y.size(0)),
          "mlp: weights[", l, "] must be ",
          stacked ? "[members, out_features, in_features] with the members of grad_y" : "[out_features, in_features]",
          " and out_features = ", shape.n, ", got ", weight[l].sizes());
      shape.k = weight[l].size(1 + d);
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

  Tensors grads(needs.size());
  std::optional<SharedGradient> shared;
  const int slices = device.mlp_route(Direction::backward, shapes_of(layers, deepest), dtype).slices;
  if (user && !user->keeps && slices == 0) shared.emplace(layers, deepest, grad_y.options());
  auto make = [&](size_t i, bool zero, std::vector<int64_t> sizes) {
    if (!needs[i]) return;
    if (stacked && i > 0) sizes.insert(sizes.begin(), grad_y.size(0));
    grads[i] = zero ? aten::zeros(sizes, grad_y.options()) : new_empty(sizes, grad_y.options());
  };
  for (size_t l = deepest; l < count; ++l) {
    const auto [m, n, k] = layers[l].shape;
    const bool zero = layers[l].is_empty();
    if (l == 0) make(0, zero, resized_last(grad_y, k));
    if (shared && needs[1 + l] && !zero)
      grads[1 + l] = shared->dweight(layers[l].shape);
    else
      make(1 + l, zero, {n, k});
    make(1 + count + l, zero, {n});
  }
  if (stacked) {
    device.each_member(grad_y.size(0), layers, [&](int64_t e) {
      MemberOutputs outputs(e);
      run_backward(device, {layers, deepest, slices, member_of(grad_y, e), members_of(input, e), members_of(weight, e),
                            members_of(a, e), outputs.of(grads)});
      outputs.put();
    });
  } else {
    run_backward(device, {layers, deepest, slices, grad_y, input, weight, a, grads, user});
  }
  std::vector<at::Tensor> out;
  if (user && !user->keeps) return out;
  for (size_t i = 0; i < needs.size(); ++i)
    if (needs[i]) out.push_back(grads[i]);
  return out;
}

}  // namespace

}  // namespace dlk
