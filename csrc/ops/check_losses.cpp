#include "ops/check_losses.h"

#include <c10/util/Exception.h>

#include "ops/check.h"

namespace dlk {
namespace {

// input's shape without its classes, as [N, d1, ...]; [] for [C].
std::vector<int64_t> sizes_of_rows(const at::Tensor& input) {
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.erase(sizes.begin() + (input.dim() > 1));
  return sizes;
}

void check_index_tensor(const at::Tensor& target, const at::Tensor& input, const char* input_name, const char* op) {
  check_place(target, "target", input, input_name, op);
  TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kByte, op,
              ": expected class indices of dtype int64 (or uint8), got ", target.scalar_type(),
              "; convert with .long()");
}

void check_indices(const at::Tensor& input, const at::Tensor& target, const char* op) {
  const std::vector<int64_t> rows = sizes_of_rows(input);
  const bool one_row = rows.empty() && target.dim() == 1 && target.size(0) == 1;
  TORCH_CHECK_VALUE(one_row || target.sizes() == at::IntArrayRef(rows), op, ": for input of shape ", input.sizes(),
                    " expected target to hold class indices of shape ", at::IntArrayRef(rows),
                    " or class probabilities of input's shape, got target of shape ", target.sizes());
  check_index_tensor(target, input, "input", op);
}

void check_one_per_class(const at::Tensor& weight, const char* name, int64_t classes, const char* op) {
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == classes, op, ": ", name, " must hold one value per class, [",
                    classes, "], got shape ", weight.sizes());
}

double checked_smoothing(double label_smoothing, const char* op) {
  TORCH_CHECK_VALUE(label_smoothing <= 1, op, ": label_smoothing must be between 0 and 1, got ", label_smoothing);
  return label_smoothing > 0 ? label_smoothing : 0;  // below 0 is none, as in torch
}

void check_probabilities(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index, const char* op) {
  TORCH_CHECK(at::isFloatingType(target.scalar_type()), op,
              ": a target of input's shape holds class probabilities; expected a floating point dtype, got ",
              target.scalar_type());
  TORCH_CHECK(ignore_index < 0, op, ": ignore_index is not supported for class probabilities, got ", ignore_index);
  check_like(target, "target", input, "input", op);
}

}  // namespace

at::Reduction::Reduction check_reduction(int64_t reduction, const char* op) {
  TORCH_CHECK_VALUE(reduction >= 0 && reduction < at::Reduction::END, op, ": expected a reduction code in [0, ",
                    int(at::Reduction::END), "), got ", reduction);
  return static_cast<at::Reduction::Reduction>(reduction);
}

DType check_elementwise_loss(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var, const char* op) {
  check_layout(input, "input", op);
  const DType dtype = dtype_of(input, op);
  auto check = [&](const at::Tensor& t, const char* name) {
    check_like(t, name, input, "input", op);
    TORCH_CHECK_VALUE(t.sizes() == input.sizes(), op, ": ", name, " must have input's shape ", input.sizes(), ", got ",
                      t.sizes());
  };
  check(target, "target");
  if (var.defined()) check(var, "var");
  return dtype;
}

ClassProblem check_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                 const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                 double label_smoothing) {
  constexpr const char* op = "cross_entropy";
  check_layout(input, "input", op);
  const DType dtype = dtype_of(input, op);
  TORCH_CHECK_VALUE(input.dim() >= 1, op, ": input must be [C], [N, C] or [N, C, d1, ...], got a 0-dimensional tensor");
  const bool soft = input.sizes() == target.sizes();
  if (soft)
    check_probabilities(input, target, ignore_index, op);
  else
    check_indices(input, target, op);
  ClassProblem problem{1, input.size(input.dim() > 1), 1, soft, 0, dtype};
  if (input.dim() > 1) problem.outer = input.size(0);
  for (int64_t i = 2; i < input.dim(); ++i) problem.inner *= input.size(i);
  if (weight) {
    check_like(*weight, "weight", input, "input", op);
    check_one_per_class(*weight, "weight", problem.classes, op);
  }
  problem.smoothing = checked_smoothing(label_smoothing, op);
  return problem;
}

LinearClassProblem check_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                              const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                              const std::optional<at::Tensor>& class_weight,
                                              const std::optional<at::Tensor>& grad_loss, double label_smoothing) {
  constexpr const char* op = "linear_cross_entropy";
  const auto [shape, dtype] = check_linear(x, weight, bias, op);
  const at::IntArrayRef rows = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_TYPE(!at::isFloatingType(target.scalar_type()), op, ": expected class indices, got ",
                   target.scalar_type(),
                   "; for class probabilities use cross_entropy(linear(x, weight, bias), target)");
  TORCH_CHECK_VALUE(target.sizes() == rows, op, ": for x of shape ", x.sizes(),
                    " expected target to hold class indices of shape ", rows, ", got target of shape ", target.sizes());
  check_index_tensor(target, x, "x", op);
  if (class_weight) {
    // beside 16-bit tensors also float32: the loss is computed in it, and autocast leaves it
    const bool float32 = class_weight->scalar_type() == at::kFloat && dtype != DType::f64;
    (float32 ? check_place : check_like)(*class_weight, "class_weight", x, "x", op);
    check_one_per_class(*class_weight, "class_weight", shape.n, op);
  }
  if (grad_loss) {
    check_place(*grad_loss, "grad_loss", x, "x", op);
    TORCH_CHECK_VALUE(grad_loss->sizes() == rows, op, ": grad_loss must hold one value per row, ", rows, ", got shape ",
                      grad_loss->sizes());
  }
  return {shape, checked_smoothing(label_smoothing, op), dtype};
}

}  // namespace dlk
