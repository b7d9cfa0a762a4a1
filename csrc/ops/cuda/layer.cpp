// A layer's products: choose the path of each, describe it to the kernels, launch on torch's current stream.
// Plain C++: nvcc compiles only the torch-free kernels, torch's headers would cost it 90 s and 3 GB.
#include "ops/cuda/layer.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/activation.h"
#include "kernels/cuda/gemm/product.h"

namespace dlk::cuda {
namespace {

// t, contiguous and where 16-byte accesses may begin.
at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor out = t.contiguous();
  return reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0 ? out : out.clone();
}

void* data(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

// What act' reads, of a Gemm or a GradPass: of mask bits the view of the y that they stand for.
template <class P>
void set_saved(P& p, const Problem& c, const OutputGrad& in) {
  if (!in.saved.defined()) return;
  p.act = c.act;
  p.saved_is_mask = is_mask(in.saved);
  p.saved = p.saved_is_mask ? View{in.saved.const_data_ptr(), c.shape.n, 1} : view_of(in.saved);
}

Path path_of(Op op, const Problem& c, const View& left, const View& right) {
  const int arch = current_arch();
  return route_of(op, c.shape, c.dtype, left, right, tf32_allowed(), arch, hopper_here(arch)).path;
}

// One of our kernels, with the scratch it wants. `like` is on the device and of the dtype.
void launch(Path path, Gemm p, const at::Tensor& like) {
  at::Tensor partials;
  if (const int64_t count = partials_size(p)) {
    partials = accumulators(count, like);
    p.partials = partials.data_ptr();
  }
  cudaError_t (*const kernel)(const Gemm&, cudaStream_t) = path == Path::simt  ? simt_gemm
                                                           : path == Path::mma ? mma_gemm
                                                                               : hopper_gemm;
  C10_CUDA_CHECK(kernel(p, stream()));
}

// Those gradients of the three that are defined, from one read of what they are made of.
void narrow_backward(const Problem& c, const OutputGrad& in, const at::Tensor& x2, const at::Tensor& weight,
                     const at::Tensor& dx, const at::Tensor& dweight, const at::Tensor& dbias) {
  FusedMlpOfOne p(c.shape);
  const at::Tensor saved = in.saved.defined() ? in.saved.contiguous() : in.saved;
  if (saved.defined()) {  // else g is dz already
    p.layer.act = c.act;
    (is_mask(saved) ? p.layer.mask : saves_output(c.act.kind) ? p.layer.h : p.layer.z) = data(saved);
  }
  if (weight.defined()) p.layer.weight = view_of(weight);
  if (x2.defined()) p.chain.x = view_of(x2);
  p.layer.dweight = data(dweight), p.layer.dbias = data(dbias);
  const at::Tensor g = fused_mlp_takes_fast(view_of(in.g), c.shape.n) ? in.g : in.g.contiguous();
  p.chain.grad_y = view_of(g);
  p.chain.dx = data(dx);
  run_fused_mlp_backward(p.chain, c.dtype, in.g);
}

void pass(const Problem& c, const OutputGrad& in, const at::Tensor& dz, const at::Tensor& dbias) {
  GradPass p{};
  p.dtype = c.dtype;
  p.m = c.shape.m, p.n = c.shape.n;
  p.g = view_of(in.g);
  set_saved(p, c, in);
  p.dz = data(dz), p.dbias = data(dbias);
  if (dbias.defined() && dbias.scalar_type() != in.g.scalar_type()) p.output_mode = OutputMode::uncast;
  at::Tensor partials;
  if (const int64_t count = grad_pass_partials(p)) {
    partials = accumulators(count, in.g);
    p.partials = partials.data_ptr();
  }
  C10_CUDA_CHECK(grad_pass(p, stream()));
}

void dgrad(Path path, const Problem& c, const OutputGrad& in, const at::Tensor& weight, at::Tensor& dx,
           BackwardEpilogue* below) {
  if (path == Path::cublas) {
    at::Tensor out = dx.view({c.shape.m, c.shape.k});
    at::mm_out(out, in.g, weight);
    return;
  }
  Gemm p = product(Op::dgrad, c.shape, c.dtype, view_of(in.g), view_of(weight));
  set_saved(p, c, in);
  p.c = dx.data_ptr();
  if (below) {
    p.below_saved = below->saved.const_data_ptr();
    p.below_is_mask = is_mask(below->saved);
    p.below_act = below->act;
    below->applied = true;
    below->summed = below->dbias.defined() && path != Path::simt;
    if (below->summed) p.column_sum = below->dbias.data_ptr();
  }
  launch(path, p, dx);
}

void wgrad(Path path, const Problem& c, const OutputGrad& in, const at::Tensor& x2, at::Tensor& dweight,
           const at::Tensor& dbias) {
  if (path == Path::cublas) {
    at::mm_out(dweight, in.g.t(), x2);
    return;
  }
  Gemm p = product(Op::wgrad, c.shape, c.dtype, view_of(in.g), view_of(x2));
  set_saved(p, c, in);
  p.saved = p.saved.transposed();
  p.c = dweight.data_ptr();
  p.row_sum = data(dbias);
  p.splits = gemm_splits(p.m, p.n, p.k);
  launch(path, p, dweight);
}

bool half(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

}  // namespace

void layer_product(Op op, const Problem& c, const at::Tensor& dz, const at::Tensor& other, OutputMode output_mode,
                   at::Tensor out) {
  if (out.numel() == 0) return;
  Path path = path_of(op, c, view_of(dz), view_of(other));
  // A library's product is rounded to dz's dtype before it is accumulated; binary16 might not even hold it.
  if (path == Path::fused_mlp || (path == Path::cublas && c.dtype == DType::f16))
    path = half(c.dtype) ? Path::mma : Path::simt;
  if (path == Path::cublas) {
    const at::Tensor left = op == Op::wgrad ? dz.t() : dz;
    if (output_mode == OutputMode::accumulate)
      out.add_(at::mm(left, other));
    else if (out.scalar_type() == dz.scalar_type())
      at::mm_out(out, left, other);
    else
      out.copy_(at::mm(left, other));
    return;
  }
  Gemm p = product(op, c.shape, c.dtype, view_of(dz), view_of(other));
  p.c = out.data_ptr();
  p.output_mode = output_mode;
  if (op == Op::wgrad) p.splits = gemm_splits(p.m, p.n, p.k);
  launch(path, p, dz);
}

void layer_dbias(const Problem& c, const at::Tensor& dz, const at::Tensor& dbias) { pass(c, {dz, {}}, {}, dbias); }

void run_fused_mlp_backward(FusedMlp p, DType dtype, const at::Tensor& like) {
  p.slices = fused_mlp_slices(p, dtype);
  const at::Tensor partials = accumulators(fused_mlp_partials(p, dtype), like);
  p.partials = partials.data_ptr();
  C10_CUDA_CHECK(fused_mlp_backward(p, dtype, stream()));
}

bool takes_mask(const Problem& c) { return needs_sign_only(c.act.kind) && half(c.dtype) && c.shape.n % kMaskBits == 0; }

bool is_mask(const at::Tensor& saved) { return saved.scalar_type() == at::kByte; }

int current_arch() {
  int device = 0, major = 0, minor = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major * 10 + minor;
}

bool hopper_here(int arch) {
  if (arch != 90) return false;
  static const bool available = hopper_available();
  return available;
}

bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

void layer_forward(const Problem& c, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                   Outputs out) {
  const auto [m, n, k] = c.shape;
  if (m == 0 || n == 0) return;
  const at::Tensor x2 = as_rows(x);
  const Path path = path_of(Op::forward, c, view_of(x2), view_of(weight));
  if (path == Path::fused_mlp) {
    FusedMlpOfOne p(c.shape);
    p.layer.weight = view_of(weight);
    p.layer.act = c.act;
    p.chain.x = view_of(x2);
    p.layer.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    p.layer.h = data(out.y), p.layer.z = data(out.z), p.layer.mask = data(out.mask);
    C10_CUDA_CHECK(fused_mlp_forward(p.chain, c.dtype, stream()));
    return;
  }

  Gemm p = product(Op::forward, c.shape, c.dtype, view_of(x2), view_of(weight));
  p.act = c.act;
  const bool aligns = bias.defined() && out.mask.defined() && path != Path::cublas;
  const at::Tensor epilogue_bias = aligns ? aligned(bias) : bias;
  p.bias = epilogue_bias.defined() ? epilogue_bias.const_data_ptr() : nullptr;
  p.c = data(out.y), p.z = data(out.z), p.mask = data(out.mask);
  if (path != Path::cublas) return launch(path, p, out.y);

  at::Tensor pre = (p.z ? out.z : out.y).view({m, n});
  if (bias.defined())
    at::addmm_out(pre, bias, x2, weight.t());
  else
    at::mm_out(pre, x2, weight.t());
  if (!p.z && c.act.kind == Act::none) return;
  ActPass pass{};
  pass.count = m * n, pass.act = c.act;
  pass.z = pre.const_data_ptr(), pass.y = p.c, pass.mask = p.mask;
  C10_CUDA_CHECK(act_pass(c.dtype, pass, stream()));
}

Gradients layer_backward(const Problem& c, const OutputGrad& in, const at::Tensor& x, const at::Tensor& weight,
                         bool need_x, bool need_weight, bool need_bias, BackwardEpilogue* below) {
  const auto [m, n, k] = c.shape;
  auto [dx, dweight, dbias] = new_gradients(c.shape, in.g, need_x, need_weight, need_bias);
  if (m == 0 || n == 0) return {dx, dweight, dbias};
  need_x = need_x && k > 0;
  need_weight = need_weight && k > 0;
  OutputGrad rows = {as_rows(in.g), in.saved};
  if (in.saved.defined()) rows.saved = as_rows(is_mask(in.saved) ? aligned(in.saved) : in.saved);
  const at::Tensor x2 = need_weight ? as_rows(x) : at::Tensor();
  const View dz_view = in.saved.defined() ? View{nullptr, n, 1} : view_of(rows.g);  // as it would come to exist
  Path dx_path = need_x ? path_of(Op::dgrad, c, dz_view, view_of(weight)) : Path::simt;
  Path dw_path = need_weight ? path_of(Op::wgrad, c, dz_view, view_of(x2)) : Path::simt;

  // A narrow layer's products are one launch, which makes dz and dbias on the way.
  const bool narrow_x = need_x && dx_path == Path::fused_mlp, narrow_weight = need_weight && dw_path == Path::fused_mlp;
  if (narrow_x || narrow_weight) {
    narrow_backward(c, rows, x2, weight, narrow_x ? dx : at::Tensor(), narrow_weight ? dweight : at::Tensor(), dbias);
    if (narrow_x) need_x = false, dx_path = Path::simt;
    if (narrow_weight) need_weight = false, dw_path = Path::simt;
    need_bias = false;
  }

  // Three ways to dz. simt: made in each product's operand load, which counts least launches. A lone wgrad on tensor
  // cores, as in a network's first layer: likewise, with dbias on the way. Otherwise one pass makes dz and dbias.
  const bool all_simt = dx_path == Path::simt && dw_path == Path::simt;
  const bool lone_wgrad = !need_x && dw_path == Path::mma && in.saved.defined();
  const bool in_load = need_weight && (all_simt || lone_wgrad) && (in.saved.defined() || need_bias);
  const bool dz_wanted = (need_x || need_weight) && in.saved.defined() && !all_simt && !in_load;
  const bool bias_in_load = in_load && need_bias;
  if (dz_wanted || (need_bias && !bias_in_load)) {
    const at::Tensor dz = dz_wanted ? at::empty({m, n}, in.g.options()) : at::Tensor();
    pass(c, rows, dz, bias_in_load ? at::Tensor() : dbias);
    if (dz_wanted) rows = {dz, at::Tensor()};
  }
  if (need_x) dgrad(dx_path, c, rows, weight, dx, below);
  if (need_weight) wgrad(dw_path, c, rows, x2, dweight, bias_in_load ? dbias : at::Tensor());
  return {dx, dweight, dbias};
}

}  // namespace dlk::cuda
