// The CUDA ops: check, describe the products to the kernels, launch on torch's current stream.
// Plain C++: nvcc compiles only the torch-free kernels, torch's headers would cost it 90 s and 3 GB.
#include "../linear_act.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../check.h"
#include "kernels.h"

namespace dlk {
namespace {

using cuda::Gemm;

void launch(const Gemm& p) { C10_CUDA_CHECK(cuda::gemm(p, c10::cuda::getCurrentCUDAStream())); }

std::vector<int64_t> resized_last(const at::Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

void forward(const Checked& c, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, at::Tensor& y,
             at::Tensor* z) {
  const at::Tensor x2 = as_rows(x), bias1 = bias ? bias->contiguous() : at::Tensor();
  Gemm p{};
  p.dtype = c.dtype;
  p.m = c.shape.m, p.n = c.shape.n, p.k = c.shape.k;
  p.a = view_of(x2);
  p.b = view_of(weight).transposed();
  p.act = c.act;
  p.bias = bias ? bias1.const_data_ptr() : nullptr;
  p.c = y.data_ptr();
  p.z = z ? z->data_ptr() : nullptr;
  p.splits = 1;
  launch(p);
}

// The description that dgrad and wgrad share: A is dz, as [M, N].
Gemm gradient_product(const Checked& c, const at::Tensor& grad_y, const at::Tensor& saved) {
  Gemm p{};
  p.dtype = c.dtype;
  p.a = view_of(grad_y);
  p.saved = view_of(saved);
  p.act = c.act;
  p.splits = 1;
  return p;
}

void dgrad(const Checked& c, const at::Tensor& grad_y, const at::Tensor& weight, const at::Tensor& saved,
           at::Tensor& dx) {
  Gemm p = gradient_product(c, grad_y, saved);
  p.m = c.shape.m, p.n = c.shape.k, p.k = c.shape.n;
  p.b = view_of(weight);
  p.c = dx.data_ptr();
  launch(p);
}

// dweight, and dbias from the same read of dz; without dweight a product of no columns, whose row sums remain.
void wgrad(const Checked& c, const at::Tensor& grad_y, const OptionalTensor& x, const at::Tensor& saved,
           at::Tensor* dweight, at::Tensor* dbias) {
  const at::Tensor x2 = dweight ? as_rows(*x) : at::Tensor();
  Gemm p = gradient_product(c, grad_y, saved);
  p.m = c.shape.n, p.n = dweight ? c.shape.k : 0, p.k = c.shape.m;
  p.a = p.a.transposed();
  p.saved = p.saved.transposed();
  if (dweight) p.b = view_of(x2), p.c = dweight->data_ptr();
  p.row_sum = dbias ? dbias->data_ptr() : nullptr;
  p.splits = cuda::gemm_splits(p.m, p.n, p.k);
  at::Tensor partials;
  if (p.splits > 1) {
    const auto dtype = grad_y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    partials = at::empty({cuda::partials_size(p)}, grad_y.options().dtype(dtype));
    p.partials = partials.data_ptr();
  }
  launch(p);
}

}  // namespace

at::Tensor linear_act_forward_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                   int64_t act, double slope) {
  const Checked c = check_forward(x, weight, bias, act, slope);
  const c10::cuda::CUDAGuard device(x.device());
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  forward(c, x, weight, bias, y, nullptr);
  return y;
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_z_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                             const OptionalTensor& bias, int64_t act, double slope) {
  const Checked c = check_forward(x, weight, bias, act, slope);
  const c10::cuda::CUDAGuard device(x.device());
  at::Tensor y = at::empty(resized_last(x, c.shape.n), x.options());
  at::Tensor z = at::empty(y.sizes(), x.options());
  forward(c, x, weight, bias, y, &z);
  return {y, z};
}

Gradients linear_act_backward_cuda(const at::Tensor& grad_y, const OptionalTensor& x, const OptionalTensor& weight,
                                   const at::Tensor& saved, int64_t act, double slope, bool need_x, bool need_weight,
                                   bool need_bias) {
  const Checked c = check_backward(grad_y, x, weight, saved, act, slope, need_x, need_weight);
  const c10::cuda::CUDAGuard device(grad_y.device());
  const at::Tensor g2 = as_rows(grad_y), saved2 = as_rows(saved);
  const auto options = grad_y.options();
  at::Tensor dx, dweight, dbias;
  if (need_x) {
    dx = at::empty(resized_last(grad_y, c.shape.k), options);
    dgrad(c, g2, *weight, saved2, dx);
  }
  if (need_weight) dweight = at::empty({c.shape.n, c.shape.k}, options);
  if (need_bias) dbias = at::empty({c.shape.n}, options);
  if (need_weight || need_bias) wgrad(c, g2, x, saved2, need_weight ? &dweight : nullptr, need_bias ? &dbias : nullptr);
  return {dx, dweight, dbias};
}

}  // namespace dlk
