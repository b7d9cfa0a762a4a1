// A layer's products: choose the path of each, describe it to the kernels.
#include "layer.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "../activation.h"
#include "route.h"

namespace dlk::cpu {
namespace {

// The description that dgrad and wgrad share: A is dz, as [M, N].
Gemm gradient_product(const Checked& c, const Incoming& in) {
  Gemm p{};
  p.dtype = c.dtype;
  p.a = view_of(in.g);
  if (in.saved.defined()) {
    p.saved = view_of(in.saved);
    p.act = c.act;
  }
  return p;
}

void dgrad(Path path, const Checked& c, const Incoming& in, const at::Tensor& weight, at::Tensor& dx, Gate* below) {
  const auto [m, n, k] = c.shape;
  Gemm p = gradient_product(c, in);
  p.m = m, p.n = k, p.k = n;
  p.b = view_of(weight);
  p.c = dx.data_ptr();
  if (path == Path::few_rows) return engine(c.dtype).few_dgrad(p, parallel_for_work(m * n * k));
  if (below) {
    p.gate = below->saved.const_data_ptr();
    p.gate_act = below->act;
    below->applied = true;
  }
  packed_gemm(p);
}

void wgrad(Path path, const Checked& c, const Incoming& in, const at::Tensor& x2, at::Tensor& dweight,
           at::Tensor* dbias) {
  const auto [m, n, k] = c.shape;
  Gemm p = gradient_product(c, in);
  p.m = n, p.n = k, p.k = m;
  p.a = p.a.transposed();
  p.saved = p.saved.transposed();
  p.b = view_of(x2);
  p.c = dweight.data_ptr();
  p.row_sum = dbias ? dbias->data_ptr() : nullptr;
  if (path == Path::few_rows) return engine(c.dtype).few_wgrad(p, parallel_for_work(m * n * k));
  p.splits = gemm_splits(p.m, p.n, p.k);
  packed_gemm(p);
}

void grad_pass(const Checked& c, const Incoming& in, at::Tensor* dz, at::Tensor* dbias) {
  const auto [m, n, k] = c.shape;
  at::Tensor partials;
  if (dbias) partials = accumulators(slices(m) * n, in.g);
  const Gemm described = gradient_product(c, in);
  const GradPass p = {c.dtype,
                      m,
                      n,
                      described.a,
                      described.saved,
                      described.act,
                      dz ? dz->data_ptr() : nullptr,
                      dbias ? dbias->data_ptr() : nullptr,
                      Store::rounded,
                      dbias ? partials.data_ptr() : nullptr};
  engine(c.dtype).grad_pass(p, parallel_for_work(m * n * 16));
}

}  // namespace

void packed_gemm(Gemm p) {
  const PackedProduct product = packed_product(p.dtype);
  const Parallel parallel = parallel_for_work(p.m * p.n * p.k);
  at::Tensor panels, partials;
  if (p.splits > 1) {
    partials = accumulators(partials_size(p), p.dtype);
    p.partials = partials.data_ptr();
  }
  if (const int64_t bytes = product.panels_size(p, parallel.threads)) {
    panels = scratch_tensor(bytes);
    p.panels = panels.data_ptr();
  }
  product.gemm(p, parallel);
}

void layer_forward(const Checked& c, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   at::Tensor& y, const at::Tensor* z) {
  const auto [m, n, k] = c.shape;
  if (m == 0 || n == 0) return;
  const at::Tensor x2 = as_rows(x);
  const Path path = route(Op::forward, c.shape, c.dtype, x2.stride(1) == 1 && weight.stride(1) == 1).path;
  if (path == Path::aten) {
    at::Tensor pre = (z ? *z : y).view({m, n});
    bias.defined() ? at::addmm_out(pre, bias, x2, weight.t()) : at::mm_out(pre, x2, weight.t());
    engine(c.dtype).act_pass({m * n, pre.const_data_ptr(), c.act, y.data_ptr()}, parallel_for_work(m * n * 16));
    return;
  }
  Gemm p{};
  p.dtype = c.dtype;
  p.m = m, p.n = n, p.k = k;
  p.a = view_of(x2);
  p.b = view_of(weight).transposed();
  p.act = c.act;
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  p.c = y.data_ptr();
  p.z = z ? z->data_ptr() : nullptr;
  if (path == Path::few_rows) return engine(c.dtype).few_forward(p, parallel_for_work(m * n * k));
  packed_gemm(p);
}

Gradients layer_backward(const Checked& c, const Incoming& in, const at::Tensor& x, const at::Tensor& weight,
                         bool need_x, bool need_weight, bool need_bias, Gate* below) {
  const auto [m, n, k] = c.shape;
  auto [dx, dweight, dbias] = new_gradients(c.shape, in.g, need_x, need_weight, need_bias);
  if (m == 0 || n == 0) return {dx, dweight, dbias};
  const Incoming rows = {as_rows(in.g), in.saved.defined() ? as_rows(in.saved) : at::Tensor()};
  const Path dx_path = route(Op::dgrad, c.shape, c.dtype, weight.defined() && weight.stride(1) == 1).path;
  const Path dw_path = route(Op::wgrad, c.shape, c.dtype, true).path;
  need_x = need_x && k > 0;
  need_weight = need_weight && k > 0;
  const bool dx_by_aten = need_x && dx_path == Path::aten, dw_by_aten = need_weight && dw_path == Path::aten;
  const bool dw_by_us = need_weight && !dw_by_aten;
  const bool dbias_with_dw = dw_by_us && (dw_path == Path::few_rows || packed_product(c.dtype).exact);

  if (dx_by_aten || dw_by_aten || (need_bias && !dbias_with_dw)) {
    at::Tensor dz;
    const bool keep = dx_by_aten || dw_by_aten;
    if (keep) dz = at::empty({m, n}, in.g.options());
    grad_pass(c, rows, keep ? &dz : nullptr, need_bias && !dbias_with_dw ? &dbias : nullptr);
    if (dx_by_aten) {
      at::Tensor out = dx.view({m, k});
      at::mm_out(out, dz, weight);
    }
    if (dw_by_aten) at::mm_out(dweight, dz.t(), as_rows(x));
  }
  if (need_x && !dx_by_aten) dgrad(dx_path, c, rows, weight, dx, below);
  if (dw_by_us) wgrad(dw_path, c, rows, as_rows(x), dweight, need_bias && dbias_with_dw ? &dbias : nullptr);
  return {dx, dweight, dbias};
}

}  // namespace dlk::cpu
