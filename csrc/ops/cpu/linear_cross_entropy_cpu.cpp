// The cross entropy of a linear layer. Its logits [M, classes] and their gradient exist for a block of rows at a time:
//
//   for each block of rows
//     logits  = x · weightᵀ + bias           gemm, left in accumulators
//     dlogits = their gradient, in place     the loss kernel, which also adds up the losses; rounded to the dtype
//     dbias  += Σ dlogits                    grad_pass; the blocks are added in f64
//     dx      = dlogits · weight             gemm
//     dweight += dlogitsᵀ · x                gemm that adds to accumulators
//
// Blocks are cut by the shape alone and follow each other, so the bits do not depend on the number of threads.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "ops/loss_calls.h"
#include "ops/losses.h"
#include "ops/cpu/layer.h"
#include "ops/cpu/losses_host.h"
#include "planning/cpu/route.h"

namespace dlk {
namespace {

using cpu::parallel_for_work;

constexpr const char* kOp = "linear_cross_entropy";

// Rows per block: 2²² logits, 16 MiB in float32. But never fewer than 256 (16-bit products, which are faster: 512), for
// each block packs all of weight and passes over all of dweight: with 128 thousand classes a block has 128 MiB.
constexpr int64_t kBlockLogits = int64_t{1} << 22;

int64_t block_rows(const Shape& shape, bool rounds) {
  const int64_t most = std::max<int64_t>(kBlockLogits / shape.n, rounds ? 512 : 256);
  const int64_t blocks = (shape.m + most - 1) / most;
  return ((shape.m + blocks - 1) / blocks + 15) / 16 * 16;  // of equal size
}

// Blocks that add to one dweight in float32 or float64. Where there are more, such sums are added to each other: one chain of
// 256 blocks (65536 rows of 16384 classes) errs three times as much as torch's product over all rows. In 16 bits dweight
// is rounded more coarsely than that.
constexpr int64_t kSumBlocks = 64;

// Whether torch's GEMM makes a block's products, and rounds them; float16 gradients would leave its range there.
bool by_aten(const Shape& block, DType dtype) {
  // of all three products: a block's few rows have no path of their own
  return dtype != DType::f16 && cpu::route(Op::forward, block, dtype, false).path == cpu::Path::aten;
}

// c = a · b + bias, or c += a · b; c as `output_mode` says.
void product(bool aten, Op op, DType dtype, const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias,
             OutputMode output_mode, at::Tensor c) {
  if (c.numel() == 0) return;
  if (aten) {
    const at::Tensor left = op == Op::wgrad ? a : cpu::for_library(a);
    if (output_mode == OutputMode::accumulate)
      c.add_(at::mm(left, b));
    else if (c.scalar_type() != a.scalar_type())
      c.copy_(at::mm(left, b));
    else
      bias.defined() ? at::addmm_out(c, bias, left, b) : at::mm_out(c, left, b);
    return;
  }
  Gemm p{};
  p.dtype = dtype;
  p.m = a.size(0), p.n = b.size(1), p.k = a.size(1);
  p.a = view_of(a);
  p.b = view_of(b);
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  p.c = c.data_ptr();
  p.output_mode = output_mode;
  p.splits = op == Op::forward ? 1 : cpu::gemm_splits(p.m, p.n, p.k);
  cpu::packed_gemm(p);
}

// dbias += the sums of the columns of dlogits; dbias is in f64.
void add_column_sums(DType dtype, const at::Tensor& dlogits, const at::Tensor& dbias) {
  const int64_t rows = dlogits.size(0), classes = dlogits.size(1);
  const at::Tensor partials = accumulators(cpu::slices(rows) * classes, dlogits), sums = accumulators(classes, dlogits);
  GradPass p{};
  p.dtype = dtype;
  p.m = rows, p.n = classes;
  p.g = p.saved = view_of(dlogits);  // the identity's gradient reads no saved value
  p.dbias = sums.data_ptr();
  p.output_mode = OutputMode::uncast;
  p.partials = partials.data_ptr();
  cpu::kernel_table(dtype).grad_pass(p, parallel_for_work(rows * classes * 16));
  dbias.add_(sums);
}

double largest(const at::Tensor& t) { return t.defined() ? t.abs().max().item<double>() : 1; }

// binary16 holds neither 1/count nor a softmax over many classes. While they are in it gradients are this power of two
// larger, which brings the largest one can be to some thousands.
double lift_of(const at::Tensor& weights, const at::Tensor& row_grad, double denominator) {
  const double bound = largest(weights) * largest(row_grad) / denominator;
  return bound > 0 && std::isfinite(bound) ? std::exp2(std::min(12 - std::ilogb(bound), 60)) : 1;
}

}  // namespace

LossOfLinear linear_cross_entropy_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                      const at::Tensor& target, const OptionalTensor& class_weight,
                                      const OptionalTensor& grad_loss, int64_t reduction_code, int64_t ignore_index,
                                      double label_smoothing, bool need_x, bool need_weight, bool need_bias) {
  const LinearCrossEntropyCall call = call_linear_cross_entropy(x, weight, bias, target, class_weight, grad_loss,
                                                                reduction_code, ignore_index, label_smoothing);
  const auto [m, classes, k] = call.shape;
  const at::Reduction::Reduction reduction = call.reduction;
  const DType dtype = call.dtype;
  const at::TensorOptions &options = call.accumulators, &grad_options = call.gradients;
  const at::Tensor &weights = call.weights, &row_grad = call.row_grad;
  const double denominator = cpu::checked_denominator(call.indices, weights, classes, ignore_index, kOp);
  const double mean = reduction == at::Reduction::Mean ? denominator : 1;
  const bool rounds = dtype == DType::bf16 || dtype == DType::f16;
  const OutputMode output_mode = dtype == DType::f16 ? OutputMode::uncast : OutputMode::cast;
  at::Tensor each, dx, dweight, dbias, later_sum;
  if (reduction == at::Reduction::None) each = at::zeros(target.sizes(), options);
  std::vector<double> sums;
  if (m == 0 || classes == 0) {  // sums over nothing
    if (need_x) dx = at::zeros(x.sizes(), grad_options);
    if (need_weight) dweight = at::zeros(weight.sizes(), grad_options);
    if (need_bias) dbias = at::zeros({classes}, grad_options);
    return {cpu::reduced(each, sums, reduction, mean, options), dx, dweight, dbias};
  }

  const bool need_grad = need_x || need_weight || need_bias;
  const DType acc_dtype = rounds ? DType::f32 : dtype;
  const double lift = need_grad && dtype == DType::f16 ? lift_of(weights, row_grad, mean) : 1;
  const int64_t block = std::min(m, block_rows(call.shape, rounds));
  const bool one_block = block == m, aten = by_aten({block, classes, k}, dtype);
  const at::Tensor logits = at::empty({block, classes}, aten ? x.options() : options);
  // A row of dlogits begins where its logits do; rounded, it takes half of their place. dbias adds up what is not rounded.
  const bool round_later = rounds && !aten && need_bias;
  at::Tensor dlogits = logits;
  if (rounds && !aten && !round_later) dlogits = logits.view(x.scalar_type()).narrow(1, 0, classes);
  if (need_x) dx = at::empty(x.sizes(), grad_options);
  if (need_weight) dweight = at::empty(weight.sizes(), one_block ? grad_options : options);
  if (need_weight && !rounds && m > kSumBlocks * block) later_sum = at::empty(weight.sizes(), options);
  if (need_bias) dbias = at::zeros({classes}, options.dtype(at::kDouble));

  cpu::CrossEntropy p{call.p};
  p.x = logits.const_data_ptr();
  p.weight_sum = cpu::weight_sum(weights, classes);
  p.scale = lift / mean;
  p.grad = need_grad ? dlogits.data_ptr() : nullptr;
  p.grad_dtype = round_later ? acc_dtype : dtype;
  p.grad_strides = {0, 1, dlogits.stride(0)};

  for (int64_t first = 0; first < m; first += block) {
    const int64_t n = std::min(block, m - first);
    const at::Tensor x_block = call.x.narrow(0, first, n);
    at::Tensor dz = dlogits.narrow(0, 0, n);
    product(aten, Op::forward, dtype, x_block, weight.t(), call.bias, OutputMode::uncast, logits.narrow(0, 0, n));

    p.inner = n;
    p.target = call.indices.const_data_ptr<int64_t>() + first;
    p.row_grad = row_grad.defined() ? row_grad.narrow(0, first, n).const_data_ptr() : nullptr;
    p.loss = each.defined() ? each.view(m).narrow(0, first, n).data_ptr() : nullptr;
    const size_t before = sums.size();
    sums.resize(before + cpu::loss_slices(p));
    p.sums = sums.data() + before;
    cpu::kernel_table(aten ? dtype : acc_dtype).losses.cross_entropy(p, parallel_for_work(n * classes * 16));

    if (need_bias) add_column_sums(p.grad_dtype, dz, dbias);
    dz = dz.to(x.scalar_type());
    if (need_x) product(aten, Op::dgrad, dtype, dz, weight, {}, output_mode, dx.view({m, k}).narrow(0, first, n));
    if (!need_weight) continue;
    const bool later = later_sum.defined() && first >= kSumBlocks * block;
    const bool opens = later ? first % (kSumBlocks * block) == 0 : first == 0;
    const OutputMode sum = one_block ? output_mode : opens ? OutputMode::uncast : OutputMode::accumulate;
    product(aten, Op::wgrad, dtype, dz.t(), x_block, {}, sum, later ? later_sum : dweight);
    if (later && (first + n == m || (first + n) % (kSumBlocks * block) == 0)) dweight.add_(later_sum);
  }
  for (at::Tensor* grad : {&dx, &dweight, &dbias}) {
    if (!grad->defined()) continue;
    if (lift != 1) grad->mul_(1 / lift);
    *grad = grad->to(grad_options.dtype().toScalarType());
  }
  return {cpu::reduced(each, sums, reduction, mean, options), dx, dweight, dbias};
}

}  // namespace dlk
