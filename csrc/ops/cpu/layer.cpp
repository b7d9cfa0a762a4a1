// A layer's products: choose the path of each, describe it to the kernels.
#include "ops/cpu/layer.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "kernels/activation.h"
#include "planning/cpu/route.h"

namespace dlk::cpu {
namespace {

// The description that dgrad and wgrad share: A is dz, as [M, N].
Gemm gradient_product(const Problem& c, const OutputGrad& in) {
  Gemm p{};
  p.dtype = c.dtype;
  p.a = view_of(in.g);
  if (in.saved.defined()) {
    p.saved = view_of(in.saved);
    p.act = c.act;
  }
  return p;
}

Path path_of(Op op, const Problem& c, bool contiguous, const AutocastLayer* autocast) {
  return (autocast ? autocast_route(op, c.shape, contiguous) : route(op, c.shape, c.dtype, contiguous)).path;
}

void run_packed(const PackedProduct& product, Gemm p) {
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

void dgrad(Path path, const Problem& c, const OutputGrad& in, const at::Tensor& weight, at::Tensor& dx,
           BackwardEpilogue* below, const AutocastLayer* autocast) {
  const auto [m, n, k] = c.shape;
  Gemm p = gradient_product(c, in);
  p.m = m, p.n = k, p.k = n;
  p.b = view_of(weight);
  p.c = dx.data_ptr();
  if (path == Path::few_rows) {
    const auto few_rows = autocast ? autocast->few_rows.dgrad : kernel_table(c.dtype).few_dgrad;
    return few_rows(p, parallel_for_work(m * n * k));
  }
  if (below) {
    p.below_saved = below->saved.const_data_ptr();
    p.below_act = below->act;
    below->applied = true;
  }
  run_packed(autocast ? autocast->packed.dgrad : packed_product(c.dtype), p);
}

void wgrad(Path path, const Problem& c, const OutputGrad& in, const at::Tensor& x2, at::Tensor& dweight,
           at::Tensor* dbias, const AutocastLayer* autocast) {
  const auto [m, n, k] = c.shape;
  Gemm p = gradient_product(c, in);
  p.m = n, p.n = k, p.k = m;
  p.a = p.a.transposed();
  p.saved = p.saved.transposed();
  p.b = view_of(x2);
  p.c = dweight.data_ptr();
  p.row_sum = dbias ? dbias->data_ptr() : nullptr;
  if (path == Path::few_rows) {
    const auto few_rows = autocast ? autocast->few_rows.wgrad : kernel_table(c.dtype).few_wgrad;
    return few_rows(p, parallel_for_work(m * n * k));
  }
  p.splits = gemm_splits(p.m, p.n, p.k);
  run_packed(autocast ? autocast->packed.wgrad : packed_product(c.dtype), p);
}

// Those of the gradients that are given, from one pass over the rows.
void few_columns_backward(const Problem& c, const OutputGrad& in, const at::Tensor& x2, const at::Tensor& weight,
                          at::Tensor* dx, at::Tensor* dweight, at::Tensor* dbias) {
  const auto [m, n, k] = c.shape;
  const Gemm described = gradient_product(c, in);
  ColumnsBackward p = {m, n, k, described.a, described.saved, described.act};
  if (dx) p.weight = view_of(weight), p.dx = dx->data_ptr();
  if (dweight) p.x = view_of(x2), p.dweight = dweight->data_ptr();
  if (dbias) p.dbias = dbias->data_ptr();
  at::Tensor partials;
  if (column_slices(m) > 1 && (dweight || dbias)) {
    partials = accumulators(column_slices(m) * n * (k + 1), c.dtype);
    p.partials = partials.data_ptr();
  }
  kernel_table(c.dtype).few_columns_backward(p, parallel_for_work(m * n * k));
}

void grad_pass(const Problem& c, const OutputGrad& in, at::Tensor* dz, at::Tensor* dbias, OutputMode output_mode) {
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
                      output_mode,
                      dbias ? partials.data_ptr() : nullptr};
  kernel_table(c.dtype).grad_pass(p, parallel_for_work(m * n * 16));
}

}  // namespace

at::Tensor for_library(const at::Tensor& a) {
  constexpr int64_t piece = 32;
  const int64_t m = a.size(0), k = a.size(1);
  if (a.element_size() != 2 || k % piece == 0) return a;
  at::Tensor copy = at::zeros({m, (k / piece + 1) * piece}, a.options()).narrow(1, 0, k);
  return copy.copy_(a);
}

void packed_gemm(Gemm p) { run_packed(packed_product(p.dtype), p); }

void layer_forward(const Problem& c, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   at::Tensor& y, const at::Tensor* z, const AutocastLayer* autocast) {
  const auto [m, n, k] = c.shape;
  if (m == 0 || n == 0) return;
  const at::Tensor x2 = as_rows(x);
  const Path path = path_of(Op::forward, c, x2.stride(1) == 1 && weight.stride(1) == 1, autocast);
  if (path == Path::aten) {
    at::Tensor pre = (z ? *z : y).view({m, n});
    const at::Tensor a = for_library(x2);
    bias.defined() ? at::addmm_out(pre, bias, a, weight.t()) : at::mm_out(pre, a, weight.t());
    kernel_table(c.dtype).act_pass({m * n, pre.const_data_ptr(), c.act, y.data_ptr()}, parallel_for_work(m * n * 16));
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
  if (path == Path::few_rows) {
    const auto few_rows = autocast ? autocast->few_rows.forward : few_forward(c.dtype, m).run;
    return few_rows(p, parallel_for_work(m * n * k));
  }
  if (path == Path::few_columns) return kernel_table(c.dtype).few_columns_forward(p, parallel_for_work(m * n * k));
  run_packed(autocast ? autocast->packed.forward : packed_product(c.dtype), p);
}

void layer_backward(const Problem& c, const OutputGrad& in, const at::Tensor& x, const at::Tensor& weight,
                    Gradients& gradients, BackwardEpilogue* below, const AutocastLayer* autocast) {
  const auto [m, n, k] = c.shape;
  auto& [dx, dweight, dbias] = gradients;
  if (m == 0 || n == 0) return;
  const OutputGrad rows = {as_rows(in.g), in.saved.defined() ? as_rows(in.saved) : at::Tensor()};
  const Path dx_path = path_of(Op::dgrad, c, weight.defined() && weight.stride(1) == 1, autocast);
  const at::Tensor x2 = dweight.defined() ? as_rows(x) : at::Tensor();
  const Path dw_path = path_of(Op::wgrad, c, x2.defined() && x2.stride(1) == 1, autocast);
  const bool need_x = dx.defined() && k > 0, need_weight = dweight.defined() && k > 0, need_bias = dbias.defined();
  const bool dx_by_aten = need_x && dx_path == Path::aten, dw_by_aten = need_weight && dw_path == Path::aten;
  const bool dw_by_us = need_weight && !dw_by_aten;
  const bool dx_by_columns = need_x && dx_path == Path::few_columns;
  const bool dw_by_columns = need_weight && dw_path == Path::few_columns;
  const bool dbias_with_dw = dw_by_us && (dw_path != Path::packed || autocast || packed_product(c.dtype).exact);

  if (dx_by_aten || dw_by_aten || (need_bias && !dbias_with_dw)) {
    at::Tensor dz;
    const bool keep = dx_by_aten || dw_by_aten;
    if (keep) dz = at::empty({m, n}, in.g.options());
    grad_pass(c, rows, keep ? &dz : nullptr, need_bias && !dbias_with_dw ? &dbias : nullptr,
              autocast ? OutputMode::uncast : OutputMode::cast);
    if (dx_by_aten) {
      at::Tensor out = dx.view({m, k});
      at::mm_out(out, for_library(dz), weight);
    }
    if (dw_by_aten) at::mm_out(dweight, dz.t(), x2);
  }
  at::Tensor* const dbias_beside = need_bias && dbias_with_dw ? &dbias : nullptr;
  if (dx_by_columns || dw_by_columns)
    few_columns_backward(c, rows, x2, weight, dx_by_columns ? &dx : nullptr, dw_by_columns ? &dweight : nullptr,
                         dw_by_columns ? dbias_beside : nullptr);
  if (need_x && !dx_by_aten && !dx_by_columns) dgrad(dx_path, c, rows, weight, dx, below, autocast);
  if (dw_by_us && !dw_by_columns) wgrad(dw_path, c, rows, x2, dweight, dbias_beside, autocast);
}

}  // namespace dlk::cpu
