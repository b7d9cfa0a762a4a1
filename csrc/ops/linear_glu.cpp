// The ops of a gated layer: check, allocate, plan and run.
#include "ops/linear_glu.h"

#include <c10/core/DeviceGuard.h>

#include <type_traits>

#include "kernels/activation.h"
#include "ops/check.h"
#include "ops/layer.h"
#include "planning/product.h"

namespace dlk {
namespace {

constexpr const char *kGlu = "linear_glu", *kGluPacked = "linear_glu_packed";

Problem check_glu_forward(const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
                          const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope) {
  const auto [shape, dtype] = check_linear(x, weight_gate, bias_gate, "linear_glu, gate");
  check_linear(x, weight_up, bias_up, "linear_glu, up");
  TORCH_CHECK(weight_gate.sizes() == weight_up.sizes(),
              "linear_glu: weight_gate and weight_up must have the same shape, got ", weight_gate.sizes(), " and ",
              weight_up.sizes());
  return {shape, dtype, check_activation(act, slope, kGlu)};
}

// `t` is like grad_y and of its shape, or it is not read.
void check_saved(const OptionalTensor& t, const char* name, bool is_read, const at::Tensor& grad_y) {
  TORCH_CHECK(t || !is_read, kGlu, ": these gradients need ", name, ", got None");
  if (!t) return;
  check_like(*t, name, grad_y, "grad_y", kGlu);
  TORCH_CHECK(t->sizes() == grad_y.sizes(), kGlu, ": ", name, " must have grad_y's shape ", grad_y.sizes(), ", got ",
              t->sizes());
}

struct Half {
  at::Tensor weight, z;
  bool dweight, dbias;
};

GluBackwardProblem check_glu_backward(const at::Tensor& grad_y, const OptionalTensor& x, const Half& gate,
                                      const Half& up, int64_t act, double slope, bool need_x) {
  const at::Tensor none;
  auto given = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  GluBackwardProblem p{};
  p.dx = need_x;
  p.dweight_gate = gate.dweight, p.dbias_gate = gate.dbias, p.dweight_up = up.dweight, p.dbias_up = up.dbias;
  // check_backward takes grad_y in place of a saved tensor, which check_saved checks by name.
  for (const Half& half : {gate, up}) {
    const Problem c = check_backward(grad_y, x, given(half.weight), grad_y, act, slope, need_x, half.dweight);
    static_cast<Problem&>(p) = {{c.shape.m, c.shape.n, std::max(p.shape.k, c.shape.k)}, c.dtype, c.act};
  }
  const bool identity = p.act.kind == Act::none;
  check_saved(given(gate.z), "gate", p.up() || (p.gate() && !identity), grad_y);
  check_saved(given(up.z), "up", p.gate(), grad_y);
  if (gate.weight.defined() && up.weight.defined())
    TORCH_CHECK(gate.weight.sizes() == up.weight.sizes(), kGlu,
                ": weight_gate and weight_up must have the same shape, got ", gate.weight.sizes(), " and ",
                up.weight.sizes());
  return p;
}

View view_or_null(const at::Tensor& t) { return t.defined() ? view_of(t) : View{}; }

// x [M, K], the weights [N, K], the biases [N] or nullptr; where the preactivations go, or nullptr, and how far apart their rows
// lie.
struct FusedForward {
  View x, weight_gate, weight_up;
  const void *bias_gate, *bias_up;
  void *gate, *up;
  int64_t z_pitch;
};

// Both products in one step.
void run_fused(const Device& device, const GluPlan& plan, const Problem& c, const FusedForward& of,
               const at::Tensor& y) {
  Product p{product(Op::forward, c.shape, c.dtype, of.x, of.weight_gate)};
  p.gated = true;
  p.b_up = of.weight_up.transposed();
  p.act = c.act;
  p.bias = of.bias_gate, p.bias_up = of.bias_up;
  p.c = y.data_ptr(), p.z = of.gate, p.z_up = of.up, p.z_pitch = of.z_pitch;
  device.product(plan.gate.steps[0], c, p, y);
}

at::Tensor forward(const Device& device, const Problem& c, const at::Tensor& x, const at::Tensor& weight_gate,
                   const at::Tensor& weight_up, const OptionalTensor& bias_gate, const OptionalTensor& bias_up,
                   bool wants_z, at::Tensor& gate, at::Tensor& up) {
  const c10::OptionalDeviceGuard guard(guarded_device(x));
  at::Tensor y = new_empty(resized_last(x, c.shape.n), x.options());
  if (wants_z) gate = new_empty(y.sizes(), x.options()), up = new_empty(y.sizes(), x.options());
  if (c.is_empty()) return y;
  const at::Tensor rows = as_rows(x), b_gate = contiguous_or_none(bias_gate), b_up = contiguous_or_none(bias_up);
  const View x_view = view_of(rows), gate_view = view_of(weight_gate), up_view = view_of(weight_up);
  const GluPlan plan = device.plan_glu_forward({c, x_view, gate_view, up_view, wants_z, false});
  if (plan.fused) {
    run_fused(device, plan, c,
              {x_view, gate_view, up_view, const_data_or_null(b_gate), const_data_or_null(b_up), data_or_null(gate),
               data_or_null(up), c.shape.n},
              y);
    return y;
  }
  // The pass overwrites one preactivation with y where nobody keeps them.
  const at::Tensor z_gate = wants_z ? gate : y, z_up = wants_z ? up : new_empty(y.sizes(), y.options());
  const Problem half = {c.shape, c.dtype, {Act::none, 0}};
  run_forward(device, plan.gate, half, rows, weight_gate, b_gate, {z_gate, {}, {}});
  run_forward(device, plan.up, half, rows, weight_up, b_up, {z_up, {}, {}});
  const auto [m, n, k] = c.shape;
  device.glu_pass(c, {m, n, z_gate.const_data_ptr(), z_up.const_data_ptr(), n, c.act, y.data_ptr()});
  return y;
}

// Memory with both halves behind each other, of n features each.
struct Packed {
  int64_t n;
  bool gate_first;

  // Pointers, because an operator of torch's for each half would take longer than a small layer. `step` is in elements, from
  // one feature to the next.
  template <class Data>
  Data* gate(Data* both, DType dtype, int64_t step = 1) const {
    return half(both, dtype, step, !gate_first);
  }
  template <class Data>
  Data* up(Data* both, DType dtype, int64_t step = 1) const {
    return half(both, dtype, step, gate_first);
  }

 private:
  template <class Data>
  Data* half(Data* both, DType dtype, int64_t step, bool second) const {
    using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
    return both && second ? static_cast<Byte*>(both) + n * step * element_size(dtype) : both;
  }
};

void check_packed(const at::Tensor& weight, int64_t n) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 2 * n, kGluPacked, ": weight must be [", 2 * n,
              ", in_features], got ", weight.sizes());
}

// z [..., 2N] receives both preactivations side by side.
at::Tensor forward_packed(const Device& device, const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias, int64_t act, double slope, bool gate_first, bool wants_z,
                          at::Tensor& z) {
  const Problem whole = [&] {
    const auto [shape, dtype] = check_linear(x, weight, bias, kGluPacked);
    return Problem{shape, dtype, {Act::none, 0}};
  }();
  const auto [m, both, k] = whole.shape;
  const Packed packed{both / 2, gate_first};
  check_packed(weight, packed.n);
  const Problem c = {{m, packed.n, k}, whole.dtype, check_activation(act, slope, kGluPacked)};
  const c10::OptionalDeviceGuard guard(guarded_device(x));
  at::Tensor y = new_empty(resized_last(x, packed.n), x.options());
  if (wants_z) z = new_empty(resized_last(x, both), x.options());
  if (c.is_empty()) return y;
  const at::Tensor rows = as_rows(x), b = contiguous_or_none(bias);
  const View x_view = view_of(rows), w = view_of(weight);
  const View gate_view = {packed.gate(w.data, c.dtype, w.row_stride), w.row_stride, w.col_stride};
  const View up_view = {packed.up(w.data, c.dtype, w.row_stride), w.row_stride, w.col_stride};
  const GluPlan plan = device.plan_glu_forward({c, x_view, gate_view, up_view, wants_z, true});
  if (plan.fused) {
    const void* const biases = const_data_or_null(b);
    void* const preactivations = data_or_null(z);
    run_fused(device, plan, c,
              {x_view, gate_view, up_view, packed.gate(biases, c.dtype), packed.up(biases, c.dtype),
               packed.gate(preactivations, c.dtype), packed.up(preactivations, c.dtype), both},
              y);
    return y;
  }
  const at::Tensor made = z.defined() ? z : new_empty({m, both}, x.options());
  run_forward(device, plan.both, whole, rows, weight, b, {made, {}, {}});
  const void* const preactivations = made.const_data_ptr();
  device.glu_pass(c, {m, packed.n, packed.gate(preactivations, c.dtype), packed.up(preactivations, c.dtype), both,
                      c.act, y.data_ptr()});
  return y;
}

struct GluBackward {
  const Device& device;
  const Problem& c;
  const GluPlan& plan;
  at::Tensor x;  // [M, K], or undefined

  void run(const Plan& of, const at::Tensor& dz, const at::Tensor& weight, const at::Tensor& dx,
           const at::Tensor& dweight, OutputMode mode) const {
    const Problem half = {{c.shape.m, dz.size(1), c.shape.k}, c.dtype, {Act::none, 0}};
    run_backward(device, of, half, {dz, {}}, x, weight, {dx, dweight, {}}, nullptr, mode);
  }

  // Both halves. x's gradient is left out where `dx` is undefined.
  void run_halves(const at::Tensor& dz_gate, const at::Tensor& dz_up, const at::Tensor& weight_gate,
                  const at::Tensor& weight_up, const at::Tensor& dx, const at::Tensor& dweight_gate,
                  const at::Tensor& dweight_up) const {
    const bool one_sum = dx.defined() && plan.dx_sum != DxSum::apart, unrounded = plan.dx_sum == DxSum::unrounded;
    at::Tensor sum = unrounded ? new_empty(dx.sizes(), dx.options().dtype(at::kFloat)) : dx, other;
    const OutputMode start = unrounded ? OutputMode::uncast : OutputMode::cast;
    if (dz_gate.defined()) run(plan.gate, dz_gate, weight_gate, sum, dweight_gate, start);
    if (one_sum) {
      run(plan.up, dz_up, weight_up, sum, dweight_up, OutputMode::accumulate);
    } else if (dz_up.defined()) {
      if (dx.defined()) other = new_empty(dx.sizes(), dx.options());
      run(plan.up, dz_up, weight_up, other, dweight_up, OutputMode::cast);
    }
    if (unrounded) dx.copy_(sum);
    if (other.defined()) at::Tensor(dx).add_(other);
  }
};

}  // namespace

at::Tensor linear_glu_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight_gate,
                              const at::Tensor& weight_up, const OptionalTensor& bias_gate,
                              const OptionalTensor& bias_up, int64_t act, double slope) {
  const Problem c = check_glu_forward(x, weight_gate, weight_up, bias_gate, bias_up, act, slope);
  at::Tensor gate, up;
  return forward(device, c, x, weight_gate, weight_up, bias_gate, bias_up, false, gate, up);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_glu_forward_z(
    const Device& device, const at::Tensor& x, const at::Tensor& weight_gate, const at::Tensor& weight_up,
    const OptionalTensor& bias_gate, const OptionalTensor& bias_up, int64_t act, double slope) {
  const Problem c = check_glu_forward(x, weight_gate, weight_up, bias_gate, bias_up, act, slope);
  at::Tensor gate, up;
  at::Tensor y = forward(device, c, x, weight_gate, weight_up, bias_gate, bias_up, true, gate, up);
  return {y, gate, up};
}

at::Tensor linear_glu_packed_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight,
                                     const OptionalTensor& bias, int64_t act, double slope, bool gate_first) {
  at::Tensor z;
  return forward_packed(device, x, weight, bias, act, slope, gate_first, false, z);
}

std::tuple<at::Tensor, at::Tensor> linear_glu_packed_forward_z(const Device& device, const at::Tensor& x,
                                                               const at::Tensor& weight, const OptionalTensor& bias,
                                                               int64_t act, double slope, bool gate_first) {
  at::Tensor z;
  at::Tensor y = forward_packed(device, x, weight, bias, act, slope, gate_first, true, z);
  return {y, z};
}

GluGradients linear_glu_backward(const Device& device, const at::Tensor& grad_y, const OptionalTensor& x,
                                 const OptionalTensor& weight_gate, const OptionalTensor& weight_up,
                                 const OptionalTensor& gate, const OptionalTensor& up, int64_t act, double slope,
                                 bool need_x, bool need_weight_gate, bool need_weight_up, bool need_bias_gate,
                                 bool need_bias_up) {
  const at::Tensor none;
  const Half half_gate = {weight_gate.value_or(none), gate.value_or(none), need_weight_gate, need_bias_gate};
  const Half half_up = {weight_up.value_or(none), up.value_or(none), need_weight_up, need_bias_up};
  GluBackwardProblem p = check_glu_backward(grad_y, x, half_gate, half_up, act, slope, need_x);
  const c10::OptionalDeviceGuard guard(guarded_device(grad_y));
  const auto [m, n, k] = p.shape;
  const at::ScalarType dtype = grad_y.scalar_type();
  auto [dx, dweight_gate, dbias_gate] =
      new_gradients(p.shape, grad_y, dtype, dtype, need_x, need_weight_gate, need_bias_gate);
  auto [no_dx, dweight_up, dbias_up] =
      new_gradients(p.shape, grad_y, dtype, dtype, false, need_weight_up, need_bias_up);
  GluGradients made = {dx, dweight_gate, dweight_up, dbias_gate, dbias_up};
  if (p.is_empty()) return made;

  const at::Tensor g = as_rows(grad_y), rows = need_weight_gate || need_weight_up ? as_rows(*x) : none;
  const at::Tensor z_gate = half_gate.z.defined() ? as_rows(half_gate.z) : none,
                   z_up = half_up.z.defined() ? as_rows(half_up.z) : none;
  p.x = view_or_null(rows);
  p.weight_gate = view_or_null(half_gate.weight), p.weight_up = view_or_null(half_up.weight);
  if (need_x) p.one_memory = half_gate.weight.is_alias_of(half_up.weight);
  const GluPlan plan = device.plan_glu_backward(p);

  // Both dz lie behind each other, or side by side where one product reads them as a matrix [M, 2N].
  const bool side_by_side = plan.halves != Halves::apart;
  const bool makes_gate = plan.pass.outputs & kDz, makes_up = plan.pass.outputs & kDzUp;
  at::Tensor dz = makes_gate || makes_up ? new_empty({(int64_t{makes_gate} + makes_up) * m, n}, g.options()) : none;
  at::Tensor dz_gate, dz_up;
  if (side_by_side) {
    dz = dz.view({m, 2 * n});
    const bool gate_first = plan.halves == Halves::gate_first;
    dz_gate = dz.narrow(1, gate_first ? 0 : n, n), dz_up = dz.narrow(1, gate_first ? n : 0, n);
  } else {
    if (makes_gate) dz_gate = dz.narrow(0, 0, m);
    if (makes_up) dz_up = dz.narrow(0, makes_gate ? m : 0, m);
  }
  device.glu_gradient_pass(
      {p.dtype, m, n, view_of(g), view_or_null(z_gate), view_or_null(z_up), p.act, data_or_null(dz_gate),
       data_or_null(dz_up), side_by_side ? 2 * n : n, data_or_null(dbias_gate), data_or_null(dbias_up), nullptr},
      g);

  const GluBackward backward = {device, p, plan, rows};
  const at::Tensor dx_of_halves = side_by_side ? none : dx;
  backward.run_halves(dz_gate, dz_up, half_gate.weight, half_up.weight, dx_of_halves, dweight_gate, dweight_up);
  if (side_by_side) {
    const at::Tensor& first = plan.halves == Halves::gate_first ? half_gate.weight : half_up.weight;
    backward.run(plan.dgrad, dz, first.as_strided({2 * n, k}, first.strides()), dx, none, OutputMode::cast);
  }
  return made;
}

Gradients linear_glu_packed_backward(const Device& device, const at::Tensor& grad_y, const OptionalTensor& x,
                                     const OptionalTensor& weight, const at::Tensor& z, int64_t act, double slope,
                                     bool gate_first, bool need_x, bool need_weight, bool need_bias) {
  // z has the shape of its gradient, which is that of the products' outputs.
  const Problem p = check_backward(z, x, weight, z, act, slope, need_x, need_weight);
  check_like(grad_y, "grad_y", z, "z", kGluPacked);
  const auto [m, both, k] = p.shape;
  const Packed packed{both / 2, gate_first};
  const int64_t n = packed.n;
  TORCH_CHECK(both == 2 * n && grad_y.dim() == z.dim() && grad_y.sizes() == at::IntArrayRef(resized_last(z, n)),
              kGluPacked, ": z must be grad_y's [..., out_features] with twice its features, got ", z.sizes(), " and ",
              grad_y.sizes());
  const c10::OptionalDeviceGuard guard(guarded_device(grad_y));
  const Problem whole = {p.shape, p.dtype, {Act::none, 0}};
  const at::ScalarType dtype = grad_y.scalar_type();
  Gradients made = new_gradients(whole.shape, grad_y, dtype, dtype, need_x, need_weight, need_bias);
  if (p.is_empty()) return made;

  const at::Tensor none, weights = weight.value_or(none);
  const auto& [dx, dweight, dbias] = made;
  const at::Tensor g = as_rows(grad_y), z_rows = as_rows(z);
  const at::Tensor dz = need_x || need_weight ? new_empty({m, both}, g.options()) : none;
  const View z_view = view_of(z_rows);
  const int64_t step = z_view.col_stride;
  const View gate_view = {packed.gate(z_view.data, p.dtype, step), z_view.row_stride, step};
  const View up_view = {packed.up(z_view.data, p.dtype, step), z_view.row_stride, step};
  void *const dzs = data_or_null(dz), *const dbiases = data_or_null(dbias);
  device.glu_gradient_pass(
      {p.dtype, m, n, view_of(g), gate_view, up_view, p.act, packed.gate(dzs, p.dtype), packed.up(dzs, p.dtype), 2 * n,
       packed.gate(dbiases, p.dtype), packed.up(dbiases, p.dtype), nullptr},
      g);
  if (!dz.defined()) return made;
  const at::Tensor rows = need_weight ? as_rows(*x) : none;
  const BackwardProblem products{
      whole, view_of(dz), false, view_or_null(rows), view_or_null(weights), need_x, need_weight, false, false, false};
  run_backward(device, device.plan_glu_products(products), whole, {dz, {}}, rows, weights, {dx, dweight, {}});
  return made;
}

}  // namespace dlk
