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
// Blocks are cut by the shape alone and follow each other. Nothing waits for the device: what has to be known of values (what
// a mean divides by, how large binary16's gradients get) stays on it.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "ops/loss_calls.h"
#include "ops/losses.h"
#include "kernels/cuda/kernels.h"
#include "ops/cuda/layer.h"

namespace dlk {
namespace {

// Rows of a block: 2²⁶ logits, 128 MiB in 16 bits, but never fewer than 2048. With R rows the product that makes dweight does
// 2·R·K operations for every class, and reads and writes 8·K bytes of accumulators: an H200, at 8e14 operations and 4.8e12
// bytes a second, takes as long for both with R = 667. (Arithmetic: nothing was measured.)
// DLKERNELS_LOSS_BLOCK_ROWS overrides it: for tests, and to measure.
constexpr int64_t kBlockLogits = int64_t{1} << 26, kFewestRows = 2048;

int64_t block_rows(const Shape& s) {
  static const int64_t given = [] {
    const char* text = std::getenv("DLKERNELS_LOSS_BLOCK_ROWS");
    if (!text || !*text) return int64_t{0};
    const int64_t rows = std::strtoll(text, nullptr, 10);
    TORCH_CHECK_VALUE(rows > 0, "DLKERNELS_LOSS_BLOCK_ROWS must be a number of rows, got '", text, "'");
    return rows;
  }();
  const int64_t most = given ? given : std::max(kBlockLogits / std::max<int64_t>(s.n, 1), kFewestRows);
  const int64_t blocks = std::max<int64_t>(1, (s.m + most - 1) / most);
  return std::max<int64_t>(1, (s.m + blocks - 1) / blocks);  // of equal size
}

// What binary16's gradients are multiplied by while they are in it: the power of two that brings the largest one can be to
// some thousands. [] in accumulators.
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

LossOfLinear linear_cross_entropy_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                       const at::Tensor& target, const OptionalTensor& class_weight,
                                       const OptionalTensor& grad_loss, int64_t reduction, int64_t ignore_index,
                                       double label_smoothing, bool need_x, bool need_weight, bool need_bias) {
  const LinearCrossEntropyCall call = call_linear_cross_entropy(x, weight, bias, target, class_weight, grad_loss,
                                                                reduction, ignore_index, label_smoothing);
  const auto [m, classes, k] = call.shape;
  const c10::cuda::CUDAGuard device(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor sums = at::zeros({cuda::kLossScratch}, x.options().dtype(at::kDouble));
  cuda::CrossEntropy p{call.p, call.dtype, call.reduction == at::Reduction::Mean};
  p.sums = sums.data_ptr<double>();
  C10_CUDA_CHECK(cuda::count_targets(p, stream));
  const at::Tensor denominator = sums.narrow(0, cuda::kLossCountsAt, cuda::kLossCounts).sum();
  const at::Tensor each = at::empty({m}, call.accumulators);

  const bool empty = m == 0 || classes == 0, need_grad = (need_x || need_weight || need_bias) && !empty;
  const int64_t block = block_rows(call.shape), blocks = (m + block - 1) / block;
  const OutputMode output_mode = call.dtype == DType::f16 ? OutputMode::uncast : OutputMode::cast;
  const bool as_layer = blocks == 1 && output_mode == OutputMode::cast;  // one backward makes all three
  const at::TensorOptions& gradients = call.gradients;
  at::Tensor dx, dweight, dbias, lift;
  if (empty) {  // sums over nothing
    if (need_x) dx = at::zeros(x.sizes(), gradients);
    if (need_weight) dweight = at::zeros(weight.sizes(), gradients);
    if (need_bias) dbias = at::zeros({classes}, gradients);
  } else if (!as_layer) {
    if (need_x) dx = at::empty({m, k}, gradients);
    if (need_weight) dweight = at::empty(weight.sizes(), call.accumulators);
    if (need_bias) dbias = at::empty({blocks, classes}, call.accumulators);
  }
  if (need_grad && call.dtype == DType::f16) lift = lift_of(call, denominator);

  const at::Tensor logits = at::empty({std::min(block, m), classes}, x.options());
  p.x = logits.const_data_ptr();
  p.grad = need_grad ? logits.data_ptr() : nullptr;
  p.in_place = true;
  p.counted = m;
  p.lift = lift.defined() ? lift.const_data_ptr() : nullptr;
  for (int64_t first = 0; first < m; first += block) {
    const int64_t rows = std::min(block, m - first);
    const Problem layer = {{rows, classes, k}, call.dtype, {Act::none, 0}};
    const at::Tensor x_block = call.x.narrow(0, first, rows), dz = logits.narrow(0, 0, rows);
    cuda::layer_forward(layer, x_block, weight, call.bias, {dz});

    p.inner = rows;
    p.target = call.indices.const_data_ptr<int64_t>() + first;
    p.row_grad = call.row_grad.defined() ? call.row_grad.narrow(0, first, rows).const_data_ptr() : nullptr;
    p.loss = each.narrow(0, first, rows).data_ptr();
    C10_CUDA_CHECK(cuda::cross_entropy(p, stream));

    if (!need_grad) continue;
    if (as_layer) {
      std::tie(dx, dweight, dbias) =
          cuda::layer_backward(layer, {dz, {}}, x_block, weight, need_x, need_weight, need_bias);
      continue;
    }
    if (need_x) cuda::layer_product(Op::dgrad, layer, dz, weight, output_mode, dx.narrow(0, first, rows));
    if (need_weight)
      cuda::layer_product(Op::wgrad, layer, dz, x_block, first ? OutputMode::accumulate : OutputMode::uncast, dweight);
    if (need_bias) cuda::layer_dbias(layer, dz, dbias[first / block]);
  }
  if (dx.defined()) dx = dx.view(x.sizes());
  if (dbias.defined() && dbias.dim() == 2) dbias = dbias.sum(0);
  for (at::Tensor* grad : {&dx, &dweight, &dbias}) {
    if (!grad->defined()) continue;
    if (lift.defined()) grad->div_(lift);
    *grad = grad->to(gradients);
  }
  return {loss_of(call, each, denominator, target.sizes()), dx, dweight, dbias};
}

}  // namespace dlk
