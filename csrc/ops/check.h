// The only checks on shapes, dtypes and devices: they validate once and return the problem.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "ops/optional_tensors.h"
#include "planning/problem.h"

namespace dlk {

// One dtype for all tensors; or, under autocast, x in float32 or bfloat16, weight and bias in float32, the rest in bfloat16.
enum class Dtypes { one, autocast };

Problem check_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t act,
                      double slope, Dtypes = Dtypes::one);
// x may be absent without need_weight, weight without need_x; shape.k is 0 when both are. x_dtype: under autocast.
Problem check_backward(const at::Tensor& grad_y, const std::optional<at::Tensor>& x,
                       const std::optional<at::Tensor>& weight, const at::Tensor& saved, int64_t act, double slope,
                       bool need_x, bool need_weight, Dtypes = Dtypes::one, at::ScalarType x_dtype = at::kFloat);

// One per layer of a chain: x [..., K], weights[l] [N_l, K_l], biases[l] [N_l] or None, acts[l] an activation's code. Of an
// ensemble, whose tensors are x [members, M, K], weights[l] [members, N_l, K_l] and biases[l] [members, N_l], those of a member.
std::vector<Problem> check_mlp(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                               at::IntArrayRef acts, double slope);
void check_mlp_counts(size_t weights, size_t biases, size_t acts);

// The pieces of such checks, for the other ops; `op` begins the message.
// x [..., in_features], weight [out_features, in_features], bias [out_features]: of one dtype and device.
std::pair<Shape, DType> check_linear(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias, const char* op, Dtypes = Dtypes::one);
DType dtype_of(const at::Tensor& t, const char* op);
int64_t rows_of(const at::Tensor& t);  // every index but the last one, one after the other
Activation check_activation(int64_t act, double slope, const char* op);
void check_layout(const at::Tensor& t, const char* name, const char* op);
// Layout and device; with check_like dtype too.
void check_place(const at::Tensor& t, const char* name, const at::Tensor& x, const char* x_name, const char* op);
void check_like(const at::Tensor& t, const char* name, const at::Tensor& x, const char* x_name, const char* op);

// The [rows, last] view of a tensor [..., last]; copies only when no such view exists.
at::Tensor as_rows(const at::Tensor& t);
View view_of(const at::Tensor& t);  // t is 2-D

}  // namespace dlk
