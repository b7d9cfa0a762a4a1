// The CPU ops: check, choose the path, describe the products to the kernels.
#include "../linear_act.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "../activation.h"
#include "../check.h"
#include "host.h"
#include "route.h"

namespace dlk {
namespace {

using cpu::accumulators;
using cpu::engine;
using cpu::parallel_for_work;
using cpu::Path;

at::Tensor contiguous_bias(const OptionalTensor& bias) { return bias ? bias->contiguous() : at::Tensor(); }

std::vector<int64_t> resized_last(const at::Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

void forward(const Checked& c, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y,
             const at::Tensor* z) {
  const auto [m, n, k] = c.shape;
  if (m == 0 || n == 0) return;
  const at::Tensor x2 = as_rows(x);
  const auto route = cpu::route(cpu::Op::forward, c.shape, c.dtype, x2.stride(1) == 1 && weight.stride(1) == 1);
  if (route.path == Path::aten) {
    const at::Tensor pre = bias.defined() ? at::addmm(bias, x2, weight.t()) : at::mm(x2, weight.t());
    if (z) z->view({m, n}).copy_(pre);
    engine(c.dtype).act_pass({m * n, pre.const_data_ptr(), c.act, y.data_ptr()}, parallel_for_work(m * n * 16));
    return;
  }
  cpu::Gemm p{};
  p.dtype = c.dtype;
  p.m = m, p.n = n, p.k = k;
  p.a = view_of(x2);
  p.b = view_of(weight).transposed();
  p.act = c.act;
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  p.c = y.data_ptr();
  p.z = z ? z->data_ptr() : nullptr;
  p.splits = 1;
  const auto run = route.path == Path::few_rows ? engine(c.dtype).few_forward : engine(c.dtype).gemm;
  run(p, parallel_for_work(m * n * k));
}

// The description that dgrad and wgrad share: A is dz, as [M, N].
cpu::Gemm gradient_product(const Checked& c, const at::Tensor& grad_y, const at::Tensor& saved) {
  cpu::Gemm p{};
  p.dtype = c.dtype;
  p.a = view_of(grad_y);
  p.saved = view_of(saved);
  p.act = c.act;
  p.splits = 1;
  return p;
}

void dgrad(Path path, const Checked& c, const at::Tensor& grad_y, const at::Tensor& weight, const at::Tensor& saved,
           at::Tensor& dx) {
  const auto [m, n, k] = c.shape;
  cpu::Gemm p = gradient_product(c, grad_y, saved);
  p.m = m, p.n = k, p.k = n;
  p.b = view_of(weight);
  p.c = dx.data_ptr();
  const auto run = path == Path::few_rows ? engine(c.dtype).few_dgrad : engine(c.dtype).gemm;
  run(p, parallel_for_work(m * n * k));
}

void wgrad(Path path, const Checked& c, const at::Tensor& grad_y, const at::Tensor& x2, const at::Tensor& saved,
           at::Tensor& dweight, at::Tensor* dbias) {
  const auto [m, n, k] = c.shape;
  cpu::Gemm p = gradient_product(c, grad_y, saved);
  p.m = n, p.n = k, p.k = m;
  p.a = p.a.transposed();
  p.saved = p.saved.transposed();
  p.b = view_of(x2);
  p.c = dweight.data_ptr();
  p.row_sum = dbias ? dbias->data_ptr() : nullptr;
  if (path == Path::few_rows) return engine(c.dtype).few_wgrad(p, parallel_for_work(m * n * k));
  p.splits = cpu::gemm_splits(p.m, p.n, p.k);
  at::Tensor partials;
  if (p.splits > 1) {
    partials = accumulators(cpu::partials_size(p), x2);
    p.partials = partials.data_ptr();
  }
  engine(c.dtype).gemm(p, parallel_for_work(m * n * k));
}

void grad_pass(const Checked& c, const at::Tensor& grad_y, const at::Tensor& saved, at::Tensor* dz, at::Tensor* dbias) {
  const auto [m, n, k] = c.shape;
  at::Tensor partials;
  if (dbias) partials = accumulators(cpu::slices(m) * n, saved);
  const cpu::GradPass p = {c.dtype,
                           m,
                           n,
                           view_of(grad_y),
                           view_of(saved),
                           c.act,
                           dz ? dz->data_ptr() : nullptr,
                           dbias ? dbias->data_ptr() : nullptr,
                           dbias ? partials.data_ptr() : nullptr};
  engine(c.dtype).grad_pass(p, parallel_for_work(m * n * 16));
}

}  // namespace

at::Tensor linear_act_forward_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                  int64_t act, double slope) {
  const Checked c = check_forward(x, weight, bias, act, slope);
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  forward(c, x, weight, contiguous_bias(bias), y, nullptr);
  return y;
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_z_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                            const OptionalTensor& bias, int64_t act, double slope) {
  const Checked c = check_forward(x, weight, bias, act, slope);
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  at::Tensor z = at::empty(y.sizes(), x.options());
  forward(c, x, weight, contiguous_bias(bias), y, &z);
  return {y, z};
}

Gradients linear_act_backward_cpu(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight,
                                  const at::Tensor& saved, int64_t act, double slope, bool need_x, bool need_weight,
                                  bool need_bias) {
  const Checked c = check_backward(grad_y, x, weight, saved, act, slope, need_x, need_weight);
  const auto [m, n, k] = c.shape;
  const auto options = grad_y.options();
  at::Tensor dx, dweight, dbias;
  if (need_x) dx = at::empty(resized_last(grad_y, k), options);
  if (need_weight) dweight = at::empty({n, k}, options);
  if (need_bias) dbias = at::empty({n}, options);

  if (m == 0 || n == 0) {  // sums over nothing
    for (at::Tensor* t : {&dx, &dweight, &dbias})
      if (t->defined()) t->zero_();
    return {dx, dweight, dbias};
  }
  const at::Tensor g2 = as_rows(grad_y), saved2 = as_rows(saved);
  const Path dx_path = cpu::route(cpu::Op::dgrad, c.shape, c.dtype, weight && weight->stride(1) == 1).path;
  const Path dw_path = cpu::route(cpu::Op::wgrad, c.shape, c.dtype, true).path;
  need_x = need_x && k > 0;
  need_weight = need_weight && k > 0;
  const bool dx_by_aten = need_x && dx_path == Path::aten, dw_by_aten = need_weight && dw_path == Path::aten;
  const bool dw_by_us = need_weight && !dw_by_aten;  // and then dbias comes with it

  if (dx_by_aten || dw_by_aten || (need_bias && !dw_by_us)) {
    at::Tensor dz;
    const bool keep = dx_by_aten || dw_by_aten;
    if (keep) dz = at::empty({m, n}, options);
    grad_pass(c, g2, saved2, keep ? &dz : nullptr, need_bias && !dw_by_us ? &dbias : nullptr);
    if (dx_by_aten) dx = at::mm(dz, *weight).view(dx.sizes());
    if (dw_by_aten) dweight = at::mm(dz.t(), as_rows(*x));
  }
  if (need_x && !dx_by_aten) dgrad(dx_path, c, g2, *weight, saved2, dx);
  if (dw_by_us) wgrad(dw_path, c, g2, as_rows(*x), saved2, dweight, need_bias ? &dbias : nullptr);
  return {dx, dweight, dbias};
}

}  // namespace dlk
