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
#include <algorithm>
#include <cmath>

#include "ops/check.h"
#include "ops/cpu/device.h"
#include "ops/cpu/losses_host.h"
#include "planning/cpu/linear_cross_entropy.h"

namespace dlk::cpu {
namespace {

constexpr const char* kOp = "linear_cross_entropy";

// c = a · b + bias, or c += a · b; c as `output_mode` says.
void block_product(bool library, Op op, DType dtype, const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias,
                   OutputMode output_mode, at::Tensor c) {
  if (c.numel() == 0) return;
  if (library) {
    const at::Tensor left = op == Op::wgrad ? a : library_operand(a);
    if (output_mode == OutputMode::accumulate)
      c.add_(aten::mm(left, b));
    else if (c.scalar_type() != a.scalar_type())
      c.copy_(aten::mm(left, b));
    else
      bias.defined() ? aten::addmm_out(c, bias, left, b) : aten::mm_out(c, left, b);
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
  p.splits = op == Op::forward ? 1 : gemm_splits(p.m, p.n, p.k);
  const Machine machine = machine_for(dtype);
  packed_gemm(machine.packed(dtype), p, machine);
}

// dbias += the sums of the columns of dlogits; dbias is in f64.
void add_column_sums(DType dtype, const at::Tensor& dlogits, const at::Tensor& dbias) {
  const int64_t rows = dlogits.size(0), classes = dlogits.size(1);
  const at::Tensor sums = accumulators(classes, dlogits);
  gradient_pass({{rows, classes, 0}, dtype, {Act::none, 0}}, {dlogits, {}}, {}, sums);
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

LossOfLinear linear_cross_entropy(const LinearCrossEntropyCall& call) {
  const auto [m, classes, k] = call.shape;
  const at::Tensor &x = call.x, &weight = call.weight;
  const bool need_x = call.need_x, need_weight = call.need_weight, need_bias = call.need_bias;
  const at::Reduction::Reduction reduction = call.reduction;
  const DType dtype = call.dtype;
  const at::TensorOptions &options = call.accumulators, &grad_options = call.gradients;
  const at::Tensor &weights = call.weights, &row_grad = call.row_grad;
  const double denominator = checked_denominator(call.indices, weights, classes, call.p.ignore_index, kOp);
  const double mean = reduction == at::Reduction::Mean ? denominator : 1;
  const bool rounds = is_16_bit(dtype);
  at::Tensor each, dx, dweight, dbias, later_sum;
  if (reduction == at::Reduction::None) each = aten::zeros(call.row_sizes, options);
  std::vector<double> sums;
  if (m == 0 || classes == 0) {  // sums over nothing
    if (need_x) dx = aten::zeros(call.x_sizes, grad_options);
    if (need_weight) dweight = aten::zeros(weight.sizes(), grad_options);
    if (need_bias) dbias = aten::zeros({classes}, grad_options);
    return {reduced(each, sums, reduction, mean, options), dx, dweight, dbias};
  }

  const bool need_grad = need_x || need_weight || need_bias;
  const DType acc_dtype = rounds ? DType::f32 : dtype;
  const double lift = need_grad && dtype == DType::f16 ? lift_of(weights, row_grad, mean) : 1;
  const Machine machine = machine_for(dtype);
  const BlockPlan plan = plan_linear_cross_entropy(call.shape, dtype, machine);
  const bool one_block = plan.blocks == 1;
  const at::Tensor logits = new_empty({plan.rows, classes}, plan.library ? x.options() : options);
  // A row of dlogits begins where its logits do; rounded, it takes half of their place. dbias sums the unrounded values.
  const bool round_later = rounds && !plan.library && need_bias;
  at::Tensor dlogits = logits;
  if (rounds && !plan.library && !round_later) dlogits = logits.view(x.scalar_type()).narrow(1, 0, classes);
  if (need_x) dx = new_empty(call.x_sizes, grad_options);
  if (need_weight) dweight = new_empty(weight.sizes(), one_block ? grad_options : options);
  if (need_weight && plan.blocks > plan.blocks_per_sum) later_sum = new_empty(weight.sizes(), options);
  if (need_bias) dbias = aten::zeros({classes}, options.dtype(at::kDouble));

  CrossEntropy p{call.p};
  p.x = logits.const_data_ptr();
  p.weight_sum = weight_sum(weights, classes);
  p.scale = lift / mean;
  p.grad = need_grad ? dlogits.data_ptr() : nullptr;
  p.grad_dtype = round_later ? acc_dtype : dtype;
  p.grad_strides = {0, 1, dlogits.stride(0)};

  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t first = plan.first_row(block), n = plan.rows_of(block, m);
    const at::Tensor x_block = call.x.narrow(0, first, n);
    at::Tensor dz = dlogits.narrow(0, 0, n);
    block_product(plan.library, Op::forward, dtype, x_block, weight.t(), call.bias, OutputMode::uncast,
                  logits.narrow(0, 0, n));

    p.inner = n;
    p.target = call.indices.const_data_ptr<int64_t>() + first;
    p.row_grad = row_grad.defined() ? row_grad.narrow(0, first, n).const_data_ptr() : nullptr;
    p.loss = each.defined() ? each.view(m).narrow(0, first, n).data_ptr() : nullptr;
    const size_t before = sums.size();
    sums.resize(before + loss_slices(p));
    p.sums = sums.data() + before;
    machine.table(plan.library ? dtype : acc_dtype).losses.cross_entropy(p, threads_for_elements(machine, n * classes));

    if (need_bias) add_column_sums(p.grad_dtype, dz, dbias);
    dz = dz.to(x.scalar_type());
    if (need_x)
      block_product(plan.library, Op::dgrad, dtype, dz, weight, {}, plan.dx, dx.view({m, k}).narrow(0, first, n));
    if (!need_weight) continue;
    const bool later = later_sum.defined() && block >= plan.blocks_per_sum;
    const bool begins = later ? block % plan.blocks_per_sum == 0 : block == 0;
    const OutputMode sum = one_block ? plan.dx : begins ? OutputMode::uncast : OutputMode::accumulate;
    block_product(plan.library, Op::wgrad, dtype, dz.t(), x_block, {}, sum, later ? later_sum : dweight);
    const bool ends = block + 1 == plan.blocks || (block + 1) % plan.blocks_per_sum == 0;
    if (later && ends) dweight.add_(later_sum);
  }
  for (at::Tensor* grad : {&dx, &dweight, &dbias}) {
    if (!grad->defined()) continue;
    if (lift != 1) grad->mul_(1 / lift);
    *grad = grad->to(grad_options.dtype().toScalarType());
  }
  return {reduced(each, sums, reduction, mean, options), dx, dweight, dbias};
}

}  // namespace dlk::cpu
