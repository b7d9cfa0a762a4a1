#include "ops/check.h"

#include <c10/util/Exception.h>

#include <string>

#include "kernels/activation.h"

namespace dlk {

DType dtype_of(const at::Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: break;
  }
  TORCH_CHECK_TYPE(false, op, ": expected float64, float32, bfloat16 or float16 tensors, got ", t.scalar_type(),
                   "; convert with .to(dtype)");
}

void check_layout(const at::Tensor& t, const char* name, const char* op) {
  TORCH_CHECK(t.layout() == at::kStrided, op, ": ", name, " must be a dense (strided) tensor, got layout ", t.layout(),
              "; call .to_dense() first");
  TORCH_CHECK(!t.is_quantized(), op, ": ", name, " must be floating point, got a quantized tensor (", t.scalar_type(),
              "); call .dequantize() first");
}

void check_place(const at::Tensor& t, const char* name, const at::Tensor& x, const char* x_name, const char* op) {
  check_layout(t, name, op);
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " is on ", t.device(), " but ", x_name, " is on ", x.device(),
              "; move one of them with .to(device)");
}

void check_like(const at::Tensor& t, const char* name, const at::Tensor& x, const char* x_name, const char* op) {
  check_place(t, name, x, x_name, op);
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " has dtype ", t.scalar_type(), " but ", x_name,
              " has dtype ", x.scalar_type(), "; convert one of them, or run under torch.autocast");
}

namespace {

constexpr const char* kOp = "linear_act";

void check_dtype(const at::Tensor& t, const char* name, at::ScalarType wanted, const char* op) {
  TORCH_CHECK_TYPE(t.scalar_type() == wanted, op, ": expected ", name, " in ", wanted, " under autocast, got ",
                   t.scalar_type());
}

// weight or bias beside x, or beside grad_y
void check_parameter(const at::Tensor& t, const char* name, const at::Tensor& x, const char* x_name, const char* op,
                     Dtypes dtypes) {
  if (dtypes == Dtypes::one) return check_like(t, name, x, x_name, op);
  check_place(t, name, x, x_name, op);
  check_dtype(t, name, at::kFloat, op);
}

void check_autocast_input(at::ScalarType x, const char* op) {
  TORCH_CHECK_TYPE(x == at::kFloat || x == at::kBFloat16, op,
                   ": expected x in float32 or bfloat16 under autocast, got ", x);
}

Casts casts_of(Dtypes dtypes, at::ScalarType x) {
  return dtypes == Dtypes::one ? Casts::none : x == at::kFloat ? Casts::f32_x : Casts::bf16_x;
}

}  // namespace

int64_t rows_of(const at::Tensor& t) {  // every index but the last one, one after the other
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

Activation check_activation(int64_t act, double slope, const char* op) {
  TORCH_CHECK_VALUE(act >= 0 && act < kActivations, op, ": expected an activation code in [0, ", kActivations,
                    "), got ", act);
  // A layer reads its gradient from the sign of y.
  TORCH_CHECK_VALUE(slope >= 0, op, ": negative_slope must be >= 0, got ", slope);
  return {static_cast<Act>(act), slope};
}

std::pair<Shape, DType> check_linear(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const char* op, Dtypes dtypes) {
  check_layout(x, "x", op);
  check_parameter(weight, "weight", x, "x", op, dtypes);
  if (dtypes == Dtypes::autocast) check_autocast_input(x.scalar_type(), op);
  const DType dtype = dtypes == Dtypes::autocast ? DType::bf16 : dtype_of(x, op);
  TORCH_CHECK(x.dim() >= 1, op, ": x must be [..., in_features], got a 0-dimensional tensor");
  TORCH_CHECK(weight.dim() == 2, op, ": weight must be [out_features, in_features], got shape ", weight.sizes());
  TORCH_CHECK(x.size(-1) == weight.size(1), op, ": x must be [..., in_features] with in_features = ", weight.size(1),
              " (weight is ", weight.sizes(), "), got x of shape ", x.sizes());
  const Shape shape{rows_of(x), weight.size(0), weight.size(1)};
  if (bias) {
    check_parameter(*bias, "bias", x, "x", op, dtypes);
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.n, op, ": bias must be [out_features] = [", shape.n,
                "], got shape ", bias->sizes());
  }
  return {shape, dtype};
}

Problem check_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t act,
                      double slope, Dtypes dtypes) {
  const auto [shape, dtype] = check_linear(x, weight, bias, kOp, dtypes);
  return {shape, dtype, check_activation(act, slope, kOp), casts_of(dtypes, x.scalar_type())};
}

Problem check_backward(const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                       const std::optional<at::Tensor>& weight, const at::Tensor& saved, int64_t act, double slope,
                       bool need_x, bool need_weight, Dtypes dtypes, at::ScalarType x_dtype) {
  check_layout(grad_y, "grad_y", kOp);
  if (dtypes == Dtypes::autocast) {
    check_dtype(grad_y, "grad_y", at::kBFloat16, kOp);
    check_autocast_input(x_dtype, kOp);
  }
  const DType dtype = dtype_of(grad_y, kOp);
  TORCH_CHECK(grad_y.dim() >= 1, "linear_act: grad_y must be [..., out_features], got a 0-dimensional tensor");
  TORCH_CHECK(x || !need_weight, "linear_act: the gradient of weight needs x, got None");
  TORCH_CHECK(weight || !need_x, "linear_act: the gradient of x needs weight, got None");
  check_like(saved, "saved", grad_y, "grad_y", kOp);
  TORCH_CHECK(saved.sizes() == grad_y.sizes(), "linear_act: saved must have grad_y's shape ", grad_y.sizes(), ", got ",
              saved.sizes());
  Shape shape{rows_of(grad_y), grad_y.size(-1), 0};
  if (weight) {
    check_parameter(*weight, "weight", grad_y, "grad_y", kOp, dtypes);
    TORCH_CHECK(weight->dim() == 2 && weight->size(0) == shape.n,
                "linear_act: weight must be [out_features, in_features] with out_features = ", shape.n, " (grad_y is ",
                grad_y.sizes(), "), got ", weight->sizes());
    shape.k = weight->size(1);
  }
  if (x) {
    if (dtypes == Dtypes::autocast) {
      check_place(*x, "x", grad_y, "grad_y", kOp);
      check_dtype(*x, "x", x_dtype, kOp);
    } else {
      check_like(*x, "x", grad_y, "grad_y", kOp);
    }
    bool same = x->dim() == grad_y.dim() && (!weight || x->size(-1) == shape.k);
    for (int64_t i = 0; same && i + 1 < x->dim(); ++i) same = x->size(i) == grad_y.size(i);
    TORCH_CHECK(same, "linear_act: x must be [..., in_features] with the leading sizes of grad_y (", grad_y.sizes(),
                "), got ", x->sizes());
    shape.k = x->size(-1);
  }
  return {shape, dtype, check_activation(act, slope, kOp), casts_of(dtypes, x_dtype)};
}

void check_mlp_counts(size_t weights, size_t biases, size_t acts) {
  TORCH_CHECK(weights > 0, "mlp: expected at least one layer, got no weights");
  TORCH_CHECK(biases == weights && acts == weights, "mlp: expected one bias (or None) and one activation for each of ",
              weights, " weights, got ", biases, " and ", acts);
}

namespace {

std::vector<Problem> check_ensemble(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                                    at::IntArrayRef acts, double slope) {
  const int64_t members = weights[0].size(0);
  TORCH_CHECK(x.dim() == 3 && x.size(0) == members, "mlp: weights[0] of shape ", weights[0].sizes(), " has ", members,
              " members; x must then be [members, rows, in_features], or one x for all of them; got shape ", x.sizes());
  const DType dtype = dtype_of(x, "mlp");
  std::vector<Problem> layers;
  Shape shape{x.size(1), x.size(2), 0};
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::string weight = "weights[" + std::to_string(l) + "]", bias = "biases[" + std::to_string(l) + "]";
    const at::Tensor& w = weights[l];
    check_like(w, weight.c_str(), x, "x", "mlp");
    TORCH_CHECK(w.dim() == 3 && w.size(0) == members && w.size(2) == shape.n, "mlp: ", weight,
                " must be [members, out_features, in_features] with ", members, " members and in_features = ", shape.n,
                l ? " (what the layer before gives)" : " (the last size of x)", ", got shape ", w.sizes());
    shape.k = shape.n;
    shape.n = w.size(1);
    if (const std::optional<at::Tensor> b = get(biases, l)) {
      check_like(*b, bias.c_str(), x, "x", "mlp");
      TORCH_CHECK(b->dim() == 2 && b->size(0) == members && b->size(1) == shape.n, "mlp: ", bias,
                  " must be [members, out_features] = [", members, ", ", shape.n, "], got shape ", b->sizes());
    }
    layers.push_back({shape, dtype, check_activation(acts[l], slope, "mlp")});
  }
  return layers;
}

}  // namespace

std::vector<Problem> check_mlp(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                               at::IntArrayRef acts, double slope) {
  check_mlp_counts(weights.size(), size_of(biases), acts.size());
  std::vector<Problem> layers;
  layers.reserve(weights.size());
  check_layout(x, "x", "mlp");
  const DType dtype = dtype_of(x, "mlp");
  TORCH_CHECK(x.dim() >= 1, "mlp: x must be [..., in_features], got a 0-dimensional tensor");
  if (weights[0].dim() == 3) return check_ensemble(x, weights, biases, acts, slope);
  Shape shape{rows_of(x), x.size(-1), 0};
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::string weight = "weights[" + std::to_string(l) + "]", bias = "biases[" + std::to_string(l) + "]";
    check_like(weights[l], weight.c_str(), x, "x", "mlp");
    TORCH_CHECK(weights[l].dim() == 2 && weights[l].size(1) == shape.n, "mlp: ", weight,
                " must be [out_features, in_features] with in_features = ", shape.n,
                l ? " (what the layer before gives)" : " (the last size of x)", ", got shape ", weights[l].sizes());
    shape.k = shape.n;
    shape.n = weights[l].size(0);
    if (const std::optional<at::Tensor> b = get(biases, l)) {
      check_like(*b, bias.c_str(), x, "x", "mlp");
      TORCH_CHECK(b->dim() == 1 && b->size(0) == shape.n, "mlp: ", bias, " must be [out_features] = [", shape.n,
                  "], got shape ", b->sizes());
    }
    layers.push_back({shape, dtype, check_activation(acts[l], slope, "mlp")});
  }
  return layers;
}

at::Tensor as_rows(const at::Tensor& t) {
  if (t.dim() == 2) return t;
  return t.reshape({rows_of(t), t.size(-1)});
}

View view_of(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

}  // namespace dlk
