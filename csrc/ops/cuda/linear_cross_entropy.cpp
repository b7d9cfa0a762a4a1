// The cross entropy of a linear layer. Its logits [M, classes] exist for a block of rows at a time, and their gradient takes
// their place:
//
//   for each block of rows
//     logits   = x · weightᵀ + bias           a layer without an activation, rounded to the dtype as any layer's
//     dlogits  = their gradient, in place     the loss kernel, which also stores each row's loss
//     dx       = dlogits · weight
//     dweight += dlogitsᵀ · x                 in accumulators
//     dbias    = Σ dlogits                    of the block, in accumulators
//
// Blocks are cut by the shape alone and follow each other. The host never waits for the device: numbers that depend on values
// (the denominator of a mean, the largest gradient in binary16) stay on the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdlib>

#include "kernels/cuda/kernels.h"
#include "ops/cuda/device.h"
#include "ops/layer.h"
#include "planning/cuda/linear_cross_entropy.h"

namespace dlk::cuda {
namespace {

// Rows of a block, for tests and to measure; 0 where it is not set.
int64_t given_block_rows() {
  static const int64_t given = [] {
    const char* text = std::getenv("DLKERNELS_LOSS_BLOCK_ROWS");
    if (!text || !*text) return int64_t{0};
    const int64_t rows = std::strtoll(text, nullptr, 10);
    TORCH_CHECK_VALUE(rows > 0, "DLKERNELS_LOSS_BLOCK_ROWS must be a number of rows, got '", text, "'");
    return rows;
  }();
  return given;
}

// The factor of gradients while they are in binary16, which holds neither 1/count nor a softmax over many classes: a power of
// two that brings the largest possible gradient to some thousands. [] in the accumulators' dtype.
at::Tensor lift_of(const LinearCrossEntropyCall& call, const at::Tensor& denominator) {
  at::Tensor bound = at::ones({}, denominator.options());
  for (const at::Tensor& factors : {call.weights, call.row_grad})
    if (factors.defined()) bound = bound.mul(factors.abs().max());
  if (call.reduction == at::Reduction::Mean) bound = bound.div(denominator);
  const at::Tensor lift = bound.log2().floor().neg().add(12).clamp_max(60).exp2();
  return at::where(bound.gt(0).logical_and(bound.isfinite()), lift, at::ones({}, lift.options())).to(call.accumulators);
}

at::Tensor loss_of(const LinearCrossEntropyCall& call, const at::Tensor& each, const at::Tensor& denominator,
                   at::IntArrayRef sizes) {
  if (call.reduction == at::Reduction::None) return each.view(sizes);
  const at::Tensor total = each.sum(at::kDouble);
  return (call.reduction == at::Reduction::Mean ? total.div(denominator) : total).to(call.accumulators);
}

}  // namespace

LossOfLinear linear_cross_entropy(const LinearCrossEntropyCall& call) {
  const auto [m, classes, k] = call.shape;
  const at::Tensor &x = call.x, &weight = call.weight;
  const bool need_x = call.need_x, need_weight = call.need_weight, need_bias = call.need_bias;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor sums = at::zeros({kLossScratch}, x.options().dtype(at::kDouble));
  CrossEntropy p{call.p, call.dtype, call.reduction == at::Reduction::Mean};
  p.sums = sums.data_ptr<double>();
  C10_CUDA_CHECK(count_targets(p, stream));
  const at::Tensor denominator = sums.narrow(0, kLossCountsAt, kLossCounts).sum();
  const at::Tensor each = at::empty({m}, call.accumulators);

  const bool empty = m == 0 || classes == 0, need_grad = (need_x || need_weight || need_bias) && !empty;
  const BlockPlan plan = plan_linear_cross_entropy(call.shape, call.dtype, given_block_rows());
  const at::TensorOptions& gradients = call.gradients;
  at::Tensor dx, dweight, dbias, lift;
  if (empty) {  // sums over nothing
    if (need_x) dx = at::zeros(call.x_sizes, gradients);
    if (need_weight) dweight = at::zeros(weight.sizes(), gradients);
    if (need_bias) dbias = at::zeros({classes}, gradients);
  } else if (!plan.one_layer) {
    if (need_x) dx = at::empty({m, k}, gradients);
    if (need_weight) dweight = at::empty(weight.sizes(), call.accumulators);
    if (need_bias) dbias = at::empty({plan.blocks, classes}, call.accumulators);
  }
  if (need_grad && call.dtype == DType::f16) lift = lift_of(call, denominator);

  const at::Tensor logits = at::empty({std::min(plan.rows, m), classes}, x.options());
  p.x = logits.const_data_ptr();
  p.grad = need_grad ? logits.data_ptr() : nullptr;
  p.in_place = true;
  p.counted = m;
  p.lift = lift.defined() ? lift.const_data_ptr() : nullptr;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t first = plan.first_row(block), rows = plan.rows_of(block, m);
    const Problem layer = {{rows, classes, k}, call.dtype, {Act::none, 0}};
    const at::Tensor x_block = call.x.narrow(0, first, rows), dz = logits.narrow(0, 0, rows);
    layer_forward(kCuda, layer, x_block, weight, call.bias, {dz, {}, {}});

    p.inner = rows;
    p.target = call.indices.const_data_ptr<int64_t>() + first;
    p.row_grad = call.row_grad.defined() ? call.row_grad.narrow(0, first, rows).const_data_ptr() : nullptr;
    p.loss = each.narrow(0, first, rows).data_ptr();
    C10_CUDA_CHECK(cross_entropy(p, stream));

    if (!need_grad) continue;
    if (plan.one_layer) {
      const at::ScalarType dtype = dz.scalar_type();
      const Gradients made = new_gradients(layer.shape, dz, dtype, dtype, need_x, need_weight, need_bias);
      layer_backward(kCuda, layer, {dz, {}}, x_block, weight, made);
      std::tie(dx, dweight, dbias) = made;
      continue;
    }
    if (need_x) rows_product(Op::dgrad, layer, dz, weight, plan.dx, dx.narrow(0, first, rows));
    if (need_weight)
      rows_product(Op::wgrad, layer, dz, x_block, block ? OutputMode::accumulate : OutputMode::uncast, dweight);
    if (need_bias) kCuda.gradient_pass(layer, {dz, {}}, {}, dbias[block]);
  }
  if (dx.defined()) dx = dx.view(call.x_sizes);
  if (dbias.defined() && dbias.dim() == 2) dbias = dbias.sum(0);
  for (at::Tensor* grad : {&dx, &dweight, &dbias}) {
    if (!grad->defined()) continue;
    if (lift.defined()) grad->div_(lift);
    *grad = grad->to(gradients);
  }
  return {loss_of(call, each, denominator, call.row_sizes), dx, dweight, dbias};
}

}  // namespace dlk::cuda
