// CUDA: its table of functions. Everything is launched on torch's current stream of the current device.
// Plain C++: nvcc compiles only the torch-free kernels, torch's headers would cost it 90 s and 3 GB.
#include "ops/cuda/device.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/activation.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "ops/check.h"
#include "ops/cuda/wide_product.h"
#include "planning/cuda/linear_glu.h"
#include "planning/product.h"

namespace dlk {
namespace cuda {
namespace {

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

// Compute capability of the current device, 90 for 9.0.
int current_arch() {
  DeviceFacts facts;
  C10_CUDA_CHECK(device_facts(&facts));
  return facts.arch;
}

bool hopper_here(int arch) {
  if (arch != 90) return false;
  static const bool available = hopper_available();
  return available;
}

// torch lets f32 products round their operands to TF32.
bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// A layer as a fused MLP of one layer.
struct FusedMlpOfOne {
  FusedMlpLayer layer{};
  FusedMlp mlp{};

  explicit FusedMlpOfOne(const Shape& s) {
    layer.n = s.n, layer.k = s.k;
    mlp.rows = s.m;
    mlp.layers = 1;
    mlp.layer = &layer;
  }
  FusedMlpOfOne(const FusedMlpOfOne&) = delete;  // mlp points to layer
};

// The sizes of a chain, for questions.
struct DescribedMlp {
  std::vector<FusedMlpLayer> layers;
  FusedMlp mlp{};

  explicit DescribedMlp(const std::vector<Shape>& shapes) : layers(shapes.size()) {
    for (size_t l = 0; l < shapes.size(); ++l) layers[l].n = shapes[l].n, layers[l].k = shapes[l].k;
    mlp.rows = shapes.empty() ? 0 : shapes[0].m;
    mlp.layers = static_cast<int>(layers.size());
    mlp.layer = layers.data();
  }
  DescribedMlp(const DescribedMlp&) = delete;  // mlp points to layers
};

// Rows of 16 bits lie so that the fused MLP kernels read more than an element at a time. (All f32 that is contiguous along
// its rows does.)
bool fused_mlp_takes_fast(const View& rows, int64_t cols) {
  const bool words = rows.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(rows.data) % 4 == 0;
  const bool gapless = rows.row_stride == cols && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  return rows.col_stride == 1 && (words || gapless);
}

// The description of a product for a question, which reads no more than dlk::Gemm's fields.
Gemm described(Op op, const Problem& c, const View& left, const View& right) {
  Gemm p{};
  static_cast<dlk::Gemm&>(p) = product(op, c.shape, c.dtype, left, right);
  return p;
}

RouteQuery query(Op op, const Problem& c, const View& left, const View& right) {
  const int arch = current_arch();
  const Gemm p = described(op, c, left, right);
  const bool aligned = mma_takes_fast(p.a) && mma_takes_fast(p.b);
  const View& rows = op == Op::wgrad ? right : left;  // of x or of dz
  const bool in_rows = fused_mlp_takes_fast(rows, op == Op::dgrad ? c.shape.n : c.shape.k);
  return {op,
          c.shape,
          c.dtype,
          c.dtype == DType::f32 && tf32_allowed(),
          aligned,
          in_rows,
          arch,
          hopper_here(arch) && hopper_takes(p),
          fused_mlp_takes(FusedMlpOfOne(c.shape).mlp, c.dtype),
          forced_path(),
          cuda_routes()};
}

int splits_of(Path path, Op op, const Problem& c) {
  if (is_library(path)) return 1;
  const auto [m, n, k] = c.shape;
  if (op == Op::wgrad)
    return path == Path::fused_mlp ? fused_mlp_slices(FusedMlpOfOne(c.shape).mlp, c.dtype) : gemm_splits(n, k, m);
  if (path != Path::mma && path != Path::hopper) return 1;
  return op == Op::forward ? few_rows_splits(m, n, k) : few_rows_splits(m, k, n);
}

// One of our products, with the scratch that it needs. `like` is on the device and of the dtype.
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

void narrow_forward(const Problem& c, const Product& p) {
  FusedMlpOfOne one(c.shape);
  one.layer.weight = p.b.transposed();
  one.layer.act = p.act;
  one.layer.bias = p.bias;
  one.layer.h = p.c, one.layer.z = p.z, one.layer.mask = p.mask;
  one.mlp.x = p.a;
  C10_CUDA_CHECK(fused_mlp_forward(one.mlp, c.dtype, stream()));
}

void run_product(const Step& step, const Problem& c, Product p, const at::Tensor& like) {
  if (step.path == Path::fused_mlp) return narrow_forward(c, p);
  Gemm gemm{};
  static_cast<dlk::Gemm&>(gemm) = p;
  gemm.mask = p.mask, gemm.saved_is_mask = p.saved_is_mask;
  gemm.below_is_mask = p.below_is_mask, gemm.column_sum = p.column_sum;
  launch(step.path, gemm, like);
}

MlpRoute route_of_mlp(Direction direction, const std::vector<Shape>& layers, DType dtype) {
  const DescribedMlp chain(layers);
  const int slices = fused_mlp_takes(chain.mlp, dtype) ? fused_mlp_slices(chain.mlp, dtype) : 0;
  return mlp_route({direction, layers, dtype, dtype == DType::f32 && tf32_allowed(), current_arch(), slices,
                    forced_path(), cuda_routes()});
}

void run_fused_mlp_backward(FusedMlp p, DType dtype, const at::Tensor& like) {
  const at::Tensor partials = accumulators(fused_mlp_partials(p, dtype), like);
  p.partials = partials.data_ptr();
  C10_CUDA_CHECK(fused_mlp_backward(p, dtype, stream()));
}

void narrow_backward(const Step&, const Problem& c, const OutputGrad& in, const at::Tensor& x, const at::Tensor& weight,
                     const Gradients& wanted) {
  const auto& [dx, dweight, dbias] = wanted;
  FusedMlpOfOne one(c.shape);
  const at::Tensor saved = in.saved.defined() ? in.saved.contiguous() : in.saved;
  if (saved.defined()) {  // else g is dz already
    one.layer.act = c.act;
    (is_mask(saved) ? one.layer.mask : saves_output(c.act.kind) ? one.layer.h : one.layer.z) = saved.data_ptr();
  }
  if (weight.defined()) one.layer.weight = view_of(weight);
  if (x.defined()) one.mlp.x = view_of(x);
  one.layer.dweight = data_or_null(dweight), one.layer.dbias = data_or_null(dbias);
  const at::Tensor g = fused_mlp_takes_fast(view_of(in.g), c.shape.n) ? in.g : in.g.contiguous();
  one.mlp.grad_y = view_of(g);
  one.mlp.dx = data_or_null(dx);
  one.mlp.slices = fused_mlp_slices(one.mlp, c.dtype);
  run_fused_mlp_backward(one.mlp, c.dtype, in.g);
}

void run_activation_pass(const Problem& c, const at::Tensor& z, const at::Tensor&, const at::Tensor& y,
                         const at::Tensor& mask) {
  ActPass p{};
  p.count = c.shape.m * c.shape.n, p.act = c.act;
  p.z = z.const_data_ptr(), p.y = y.data_ptr(), p.mask = data_or_null(mask);
  C10_CUDA_CHECK(act_pass(c.dtype, p, stream()));
}

void run_gradient_pass(const Problem& c, const OutputGrad& in, const at::Tensor& dz, const at::Tensor& dbias) {
  GradPass p{};
  p.dtype = c.dtype;
  p.m = c.shape.m, p.n = c.shape.n;
  p.g = view_of(in.g);
  if (in.saved.defined()) {
    p.act = c.act;
    p.saved_is_mask = is_mask(in.saved);
    p.saved = p.saved_is_mask ? contiguous_view(c.shape.n, in.saved.const_data_ptr()) : view_of(in.saved);
  }
  p.dz = data_or_null(dz), p.dbias = data_or_null(dbias);
  if (dbias.defined() && dbias.scalar_type() != in.g.scalar_type()) p.output_mode = OutputMode::uncast;
  at::Tensor partials;
  if (const int64_t count = grad_pass_partials(p)) {
    partials = accumulators(count, in.g);
    p.partials = partials.data_ptr();
  }
  C10_CUDA_CHECK(grad_pass(p, stream()));
}

void run_glu_gradient_pass(GluGradPass p, const at::Tensor& like) {
  at::Tensor partials;
  if (const int64_t count = glu_grad_pass_partials(p)) {
    partials = accumulators(count, like);
    p.partials = partials.data_ptr();
  }
  C10_CUDA_CHECK(glu_grad_pass(p, stream()));
}

// Bytes that a step allocates besides its outputs; of splits and dz, not of a library's workspace.
int64_t scratch_bytes(const Step& step, const Problem& c) {
  const auto [m, n, k] = c.shape;
  const int64_t accumulator = accumulator_size(c.dtype), element = element_size(c.dtype);
  if (step.kind == StepKind::gradient_pass) {
    GradPass p{};
    p.dtype = c.dtype, p.m = m, p.n = n;
    p.dbias = step.outputs & kDbias ? &p : nullptr;  // only compared with null
    return (step.outputs & kDz ? m * n * element : 0) + grad_pass_partials(p) * accumulator;
  }
  if (step.kind == StepKind::backward) {
    FusedMlpOfOne one(c.shape);
    one.mlp.slices = step.splits;
    return fused_mlp_partials(one.mlp, c.dtype) * accumulator;
  }
  if (is_library(step.path) || step.path == Path::fused_mlp || step.kind == StepKind::activation_pass) return 0;
  const Op op = step.kind == StepKind::forward ? Op::forward : step.kind == StepKind::dgrad ? Op::dgrad : Op::wgrad;
  Gemm p = described(op, c, {}, {});
  p.splits = step.splits;
  p.row_sum = step.outputs & kDbias ? &p : nullptr;
  p.column_sum = step.outputs & kDbiasBelow ? &p : nullptr;
  return partials_size(p) * accumulator;
}

}  // namespace

const Machine kMachine = {&query, &splits_of, &scratch_bytes};

void rows_product(Op op, const Problem& c, const at::Tensor& dz, const at::Tensor& other, OutputMode output_mode,
                  at::Tensor out) {
  if (out.numel() == 0) return;
  Path path = route(query(op, c, view_of(dz), view_of(other))).path;
  if (path == Path::fused_mlp) path = is_16_bit(c.dtype) ? Path::mma : Path::simt;
  if (is_library(path)) {
    const at::Tensor left = op == Op::wgrad ? dz.t() : dz;
    const bool adds = output_mode == OutputMode::accumulate;
    if (out.scalar_type() != dz.scalar_type())
      wide_product(out, left, other, adds);
    else if (adds)
      at::addmm_out(out, out, left, other);
    else
      at::mm_out(out, left, other);
    return;
  }
  Gemm p = described(op, c, view_of(dz), view_of(other));
  p.c = out.data_ptr();
  p.output_mode = output_mode;
  if (op == Op::wgrad) p.splits = gemm_splits(p.m, p.n, p.k);
  launch(path, p, dz);
}

std::pair<MlpRoute, int64_t> mlp_route_and_scratch(Direction direction, const std::vector<Shape>& layers, DType dtype) {
  const MlpRoute route = route_of_mlp(direction, layers, dtype);
  if (route.slices == 0 || direction == Direction::forward) return {route, 0};
  DescribedMlp chain(layers);
  chain.mlp.slices = route.slices;
  return {route, fused_mlp_partials(chain.mlp, dtype) * int64_t{sizeof(float)}};
}

}  // namespace cuda

const Device kCuda = {
    [](const ForwardProblem& p) { return cuda::plan_forward(p, cuda::kMachine); },
    [](const BackwardProblem& p) { return cuda::plan_backward(p, cuda::kMachine); },
    &cuda::run_product,
    &cuda::narrow_backward,
    &cuda::run_activation_pass,
    /*pass_adds_bias=*/[](DType) { return false; },
    /*derivative_pass=*/nullptr,
    &cuda::run_gradient_pass,
    [](const GluForwardProblem& p) { return cuda::plan_glu_forward(p, cuda::kMachine); },
    [](const GluBackwardProblem& p) { return cuda::plan_glu_backward(p, cuda::kMachine); },
    [](const BackwardProblem& p) { return cuda::plan_backward(p, cuda::kMachine); },
    [](const Problem& c, const GluPass& p) { C10_CUDA_CHECK(cuda::glu_pass(c.dtype, p, cuda::stream())); },
    &cuda::run_glu_gradient_pass,
    /*library_operand=*/[](const at::Tensor& a) { return a; },
    /*has_masks=*/true,
    /*takes_mask=*/
    [](const Problem& c) { return needs_sign_only(c.act.kind) && is_16_bit(c.dtype) && c.shape.n % kMaskBits == 0; },
    &cuda::route_of_mlp,
    [](const FusedMlp& p, DType dtype) { C10_CUDA_CHECK(cuda::fused_mlp_forward(p, dtype, cuda::stream())); },
    &cuda::run_fused_mlp_backward,
    [](int64_t members, const std::vector<Problem>&, c10::function_ref<void(int64_t)> body) {
      for (int64_t e = 0; e < members; ++e) body(e);
    },
    &cuda::elementwise_loss,
    &cuda::cross_entropy,
    &cuda::linear_cross_entropy,
};

}  // namespace dlk
