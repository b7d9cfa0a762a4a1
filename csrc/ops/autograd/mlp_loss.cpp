#include "ops/autograd/mlp_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Reduction.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>

#include "ops/aten.h"
#include "ops/autograd/function.h"
#include "ops/autograd/losses.h"
#include "ops/autograd/mlp.h"
#include "ops/check.h"

namespace dlk {
namespace {

// The loss and its gradient for y.
std::tuple<at::Tensor, at::Tensor> loss_of(const at::Tensor& y, const at::Tensor& target, LossKind kind,
                                           const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                                           double label_smoothing) {
  if (kind == LossKind::mse) return call_mse_loss_forward(y, target, reduction, true);
  auto [loss, grad, grad_target] =
      call_cross_entropy_forward(y, target, class_weight, reduction, ignore_index, label_smoothing, true, false);
  return {loss, grad};
}

// The losses of the members [E], and their gradients [E, M, N]. A target without the dimension of members is every member's.
std::tuple<at::Tensor, at::Tensor> losses_of_members(const at::Tensor& y, const at::Tensor& target, LossKind kind,
                                                     const OptionalTensor& class_weight, int64_t reduction,
                                                     int64_t ignore_index, double label_smoothing) {
  const int64_t members = y.size(0);
  TORCH_CHECK(members > 0, "mlp_loss: expected an ensemble with at least one member, got none");
  const bool shared = target.dim() < (target.is_floating_point() ? 3 : 2);
  TORCH_CHECK(shared || target.size(0) == members, "mlp_loss: expected a target for each of ", members,
              " members, or one for all of them without a dimension of members; got shape ", target.sizes());
  std::vector<at::Tensor> losses, grads;
  for (int64_t e = 0; e < members; ++e) {
    const auto [loss, grad] = loss_of(member_of(y, e), shared ? target : member_of(target, e), kind, class_weight,
                                      reduction, ignore_index, label_smoothing);
    losses.push_back(loss), grads.push_back(grad);
  }
  return {aten::stack(losses), aten::stack(grads)};
}

// `user` may be null.
LossOfMlp compute(const GradientUser* user, bool only_finite, const at::Tensor& x, at::TensorList weights,
                  const OptionalTensors& biases, at::IntArrayRef acts, double slope, const at::Tensor& target,
                  int64_t kind, const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                  double label_smoothing, at::IntArrayRef needs) {
  const size_t count = weights.size();
  check_mlp_counts(count, size_of(biases), acts.size());
  TORCH_CHECK(needs.size() == 2 * count, "mlp_loss: expected two entries in needs for each of ", count,
              " weights, got ", needs.size());
  TORCH_CHECK_VALUE(kind == 0 || kind == 1, "mlp_loss: expected loss kind 0 (mse) or 1 (cross entropy), got ", kind);
  TORCH_CHECK_VALUE(reduction == at::Reduction::Mean || reduction == at::Reduction::Sum,
                    "mlp_loss: expected reduction 1 (mean) or 2 (sum), got ", reduction);
  // Without the keys of autograd, whose fallback for ops without a derivative boxes every argument.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::vector<int64_t> all_needs = {0};  // x's
  all_needs.insert(all_needs.end(), needs.begin(), needs.end());
  const Saves saves = saves_for(acts, all_needs);
  const bool stacked = weights[0].dim() == 3, shared_x = stacked && x.dim() == 2;
  const at::Tensor input = shared_x ? x.expand({weights[0].size(0), x.size(0), x.size(1)}) : x;
  const std::vector<at::Tensor> outputs = call_mlp_forward(input, weights, biases, acts, slope, saves.keep);
  const at::Tensor& y = outputs[0];
  const auto [loss, grad] = (stacked ? losses_of_members : loss_of)(
      y, target, static_cast<LossKind>(kind), class_weight, reduction, ignore_index, label_smoothing);
  std::vector<at::Tensor> gradients;
  const bool any = std::any_of(needs.begin(), needs.end(), [](int64_t need) { return need != 0; });
  if (any && (!only_finite || is_finite(loss))) {
    OptionalTensorList operands;
    for (size_t l = 0; l < count; ++l)
      operands.push_back(l < saves.first_weight ? std::nullopt : OptionalTensor(weights[l]));
    const at::Tensor g = grad.to(y.scalar_type());
    const at::TensorList kept = at::TensorList(outputs).slice(1);
    gradients = user ? mlp_backward_for(kCpu, *user, g, input, operands, y, kept, saves.keep, acts, slope, all_needs)
                     : call_mlp_backward(g, input, operands, y, kept, saves.keep, acts, slope, all_needs, stacked);
  }
  return {loss, y, gradients};
}

}  // namespace

bool is_finite(const at::Tensor& loss) { return std::isfinite((loss.dim() ? loss.sum() : loss).item<double>()); }

LossOfMlp mlp_loss(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
                   double slope, const at::Tensor& target, int64_t kind, const OptionalTensor& class_weight,
                   int64_t reduction, int64_t ignore_index, double label_smoothing, at::IntArrayRef needs) {
  return compute(nullptr, false, x, weights, biases, acts, slope, target, kind, class_weight, reduction, ignore_index,
                 label_smoothing, needs);
}

LossOfMlp mlp_loss_for(const GradientUser& user, bool only_finite, const at::Tensor& x, at::TensorList weights,
                       const OptionalTensors& biases, at::IntArrayRef acts, double slope, const at::Tensor& target,
                       int64_t kind, const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, at::IntArrayRef needs) {
  RECORD_FUNCTION("dlkernels::_mlp_loss", c10::ArrayRef<const c10::IValue>{});
  return compute(&user, only_finite, x, weights, biases, acts, slope, target, kind, class_weight, reduction,
                 ignore_index, label_smoothing, needs);
}

LossOfMlp call_mlp_loss(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                        at::IntArrayRef acts, double slope, const at::Tensor& target, int64_t kind,
                        const OptionalTensor& class_weight, int64_t reduction, int64_t ignore_index,
                        double label_smoothing, at::IntArrayRef needs) {
  using F = LossOfMlp(const at::Tensor&, at::TensorList, const OptionalTensors&, at::IntArrayRef, double,
                      const at::Tensor&, int64_t, const OptionalTensor&, int64_t, int64_t, double, at::IntArrayRef);
  static const auto op = dispatched<F>("dlkernels::_mlp_loss");
  return op.call(x, weights, biases, acts, slope, target, kind, class_weight, reduction, ignore_index, label_smoothing,
                 needs);
}

}  // namespace dlk
