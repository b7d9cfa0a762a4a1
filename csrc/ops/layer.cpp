#include "ops/layer.h"

#include "ops/check.h"
#include "planning/product.h"

namespace dlk {
namespace {

// Contiguous, and where accesses of 16 bytes may begin: as kernels that write or read masks need it.
at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor out = t.contiguous();
  return reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0 ? out : out.clone();
}

at::Tensor wanted(const Step& step, Output output, const at::Tensor& t) {
  return step.outputs & output ? t : at::Tensor();
}

// dgrad or wgrad of `left`, which is dz; or, where the step makes dz in its load, grad_y.
Product gradient_product(const Step& step, const Problem& c, const View& left, const at::Tensor& saved,
                         const View& weight, const View& x) {
  const bool is_dgrad = step.kind == StepKind::dgrad;
  Product p{product(is_dgrad ? Op::dgrad : Op::wgrad, c.shape, c.dtype, left, is_dgrad ? weight : x)};
  p.splits = step.splits;
  if (!step.dz_in_load) return p;
  p.act = c.act;
  p.saved_is_mask = is_mask(saved);
  const View view = p.saved_is_mask ? contiguous_view(c.shape.n, saved.const_data_ptr()) : view_of(saved);
  p.saved = is_dgrad ? view : view.transposed();
  return p;
}

void library_dgrad(const Device& device, const Problem& c, const at::Tensor& dz, const at::Tensor& weight,
                   const at::Tensor& dx, OutputMode mode) {
  at::Tensor out = dx.view({c.shape.m, c.shape.k});
  const at::Tensor operand = device.library_operand(dz);
  if (mode == OutputMode::accumulate)
    aten::addmm_out(out, out, operand, weight);
  else
    aten::mm_out(out, operand, weight);
}

void library_wgrad(const Device& device, const at::Tensor& dz, const at::Tensor& x, const at::Tensor& dweight) {
  at::Tensor out = dweight;
  // The transpose of a contiguous dz lies column by column, which a library reads without harm.
  aten::mm_out(out, dz.is_contiguous() ? dz.t() : device.library_operand(dz.t()), x);
}

void library_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                     at::Tensor out) {
  const at::Tensor operand = device.library_operand(x);
  if (bias.defined())
    aten::addmm_out(out, bias, operand, weight.t());
  else
    aten::mm_out(out, operand, weight.t());
}

}  // namespace

void run_forward(const Device& device, const Plan& plan, const Problem& c, const at::Tensor& x,
                 const at::Tensor& weight, const at::Tensor& bias, const Outputs& out) {
  const at::Tensor x2 = as_rows(x);
  const View x_view = view_of(x2), weight_view = view_of(weight);
  const at::Tensor none;
  // A library writes the bias to every row of its output first, and adds the product to it.
  const bool bias_later = plan.end()[-1].kind == StepKind::activation_pass && device.pass_adds_bias(c.dtype);
  for (const Step& step : plan) {
    if (step.kind == StepKind::activation_pass) {
      device.activation_pass(c, out.z.defined() ? out.z : out.y, bias_later ? bias : none, out.y, out.mask);
    } else if (is_library(step.path)) {
      library_forward(device, x2, weight, bias_later ? none : bias,
                      (out.z.defined() ? out.z : out.y).view({c.shape.m, c.shape.n}));
    } else {
      const bool aligns = bias.defined() && out.mask.defined() && step.path != Path::fused_mlp;
      const at::Tensor epilogue_bias = aligns ? aligned(bias) : bias;
      Product p{product(Op::forward, c.shape, c.dtype, x_view, weight_view)};
      p.act = c.act, p.splits = step.splits;
      p.bias = const_data_or_null(epilogue_bias);
      p.c = out.y.data_ptr(), p.z = data_or_null(out.z), p.mask = data_or_null(out.mask);
      device.product(step, c, p, out.y);
    }
  }
}

void run_backward(const Device& device, const Plan& plan, const Problem& c, const OutputGrad& in, const at::Tensor& x,
                  const at::Tensor& weight, const Gradients& gradients, BackwardEpilogue* below, OutputMode dx_mode) {
  const auto& [dx, dweight, dbias] = gradients;
  const at::Tensor g = as_rows(in.g);
  at::Tensor saved;
  if (in.saved.defined()) saved = as_rows(is_mask(in.saved) ? aligned(in.saved) : in.saved);
  const at::Tensor x2 = dweight.defined() ? as_rows(x) : at::Tensor();
  const View g_view = view_of(g), x_view = x2.defined() ? view_of(x2) : View{},
             weight_view = weight.defined() ? view_of(weight) : View{};
  at::Tensor dz = saved.defined() ? at::Tensor() : g;

  for (const Step& step : plan) {
    const at::Tensor step_dbias = wanted(step, kDbias, dbias);
    if (step.kind == StepKind::gradient_pass) {
      if (step.outputs & kDz) dz = new_empty({c.shape.m, c.shape.n}, g.options());
      device.gradient_pass(c, {g, saved}, wanted(step, kDz, dz), step_dbias);
    } else if (step.kind == StepKind::backward) {
      device.backward(step, c, {g, saved}, x2, weight,
                      {wanted(step, kDx, dx), wanted(step, kDweight, dweight), step_dbias});
    } else if (is_library(step.path)) {
      step.kind == StepKind::dgrad ? library_dgrad(device, c, dz, weight, dx, dx_mode)
                                   : library_wgrad(device, dz, x2, dweight);
    } else {
      Product p = gradient_product(step, c, step.dz_in_load ? g_view : view_of(dz), saved, weight_view, x_view);
      p.c = (step.kind == StepKind::dgrad ? dx : dweight).data_ptr();
      p.row_sum = data_or_null(step_dbias);
      if (step.kind == StepKind::dgrad) p.output_mode = dx_mode;
      if (step.below) {
        p.below_saved = below->saved.const_data_ptr();
        p.below_is_mask = is_mask(below->saved);
        p.below_act = below->act;
        below->applied = true;
      }
      if (step.outputs & kDbiasBelow) {
        p.column_sum = below->dbias.data_ptr();
        below->summed_dbias = true;
      }
      device.product(step, c, p, g);
    }
  }
}

void layer_forward(const Device& device, const Problem& c, const at::Tensor& x, const at::Tensor& weight,
                   const at::Tensor& bias, const Outputs& out) {
  if (c.is_empty()) return;
  const at::Tensor x2 = as_rows(x);
  const ForwardProblem problem = {c, view_of(x2), view_of(weight), out.z.defined(), out.mask.defined()};
  run_forward(device, device.plan_forward(problem), c, x2, weight, bias, out);
}

void layer_backward(const Device& device, const Problem& c, const OutputGrad& in, const at::Tensor& x,
                    const at::Tensor& weight, const Gradients& gradients, BackwardEpilogue* below) {
  if (c.is_empty()) return;
  const auto& [dx, dweight, dbias] = gradients;
  const bool has_below = below && below->saved.defined();
  const at::Tensor g = as_rows(in.g), x2 = dweight.defined() ? as_rows(x) : at::Tensor();
  const BackwardProblem problem = {c,
                                   view_of(g),
                                   in.saved.defined(),
                                   x2.defined() ? view_of(x2) : View{},
                                   weight.defined() ? view_of(weight) : View{},
                                   dx.defined(),
                                   dweight.defined(),
                                   dbias.defined(),
                                   has_below,
                                   has_below && below->dbias.defined()};
  run_backward(device, device.plan_backward(problem), c, {g, in.saved}, x2, weight, gradients, below);
}

}  // namespace dlk
