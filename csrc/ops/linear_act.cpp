// The ops of one layer: check, allocate, plan and run.
#include "ops/linear_act.h"

#include <c10/core/DeviceGuard.h>

#include "ops/check.h"
#include "ops/layer.h"

namespace dlk {
namespace {

enum class Beside { nothing, z, mask };  // the tensor that forward makes beside y

Outputs forward(const Device& device, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                const Problem& c, Beside beside) {
  const c10::OptionalDeviceGuard guard(guarded_device(x));
  const at::TensorOptions options = c.casts == Casts::none ? x.options() : x.options().dtype(at::kBFloat16);
  Outputs out{new_empty(resized_last(x, c.shape.n), options), {}, {}};
  if (beside == Beside::z) out.z = new_empty(out.y.sizes(), options);
  if (beside == Beside::mask) out.mask = new_empty(resized_last(x, c.shape.n / kMaskBits), options.dtype(at::kByte));
  layer_forward(device, c, x, weight, contiguous_or_none(bias), out);
  return out;
}

Gradients backward(const Device& device, const Problem& c, const at::Tensor& grad_y, const OptionalTensor& x,
                   const OptionalTensor& weight, const at::Tensor& saved, const Gradients& made) {
  const c10::OptionalDeviceGuard guard(guarded_device(grad_y));
  const at::Tensor none;
  layer_backward(device, c, {grad_y, c.act.kind == Act::none ? none : saved}, x.value_or(none), weight.value_or(none),
                 made);
  return made;
}

void check_mask(const Device& device, const Problem& c) {
  TORCH_CHECK(device.has_masks, "linear_act: kernels of this device make no masks");
  TORCH_CHECK(device.takes_mask(c),
              "linear_act: a mask is of relu or leaky_relu, in bfloat16 or float16, with a multiple of ", kMaskBits,
              " out_features; got activation code ", static_cast<int>(c.act.kind), " and ", c.shape.n, " out_features");
}

}  // namespace

at::Tensor linear_act_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight,
                              const OptionalTensor& bias, int64_t act, double slope) {
  return forward(device, x, weight, bias, check_forward(x, weight, bias, act, slope), Beside::nothing).y;
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_z(const Device& device, const at::Tensor& x,
                                                        const at::Tensor& weight, const OptionalTensor& bias,
                                                        int64_t act, double slope) {
  const Outputs out = forward(device, x, weight, bias, check_forward(x, weight, bias, act, slope), Beside::z);
  return {out.y, out.z};
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_mask(const Device& device, const at::Tensor& x,
                                                           const at::Tensor& weight, const OptionalTensor& bias,
                                                           int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope);
  check_mask(device, c);
  const Outputs out = forward(device, x, weight, bias, c, Beside::mask);
  return {out.y, out.mask};
}

Gradients linear_act_backward(const Device& device, const at::Tensor& grad_y, const OptionalTensor& x,
                              const OptionalTensor& weight, const at::Tensor& saved, int64_t act, double slope,
                              bool need_x, bool need_weight, bool need_bias) {
  // The checks expect a tensor of grad_y's shape; a mask has its own checks.
  const bool masked = device.has_masks && is_mask(saved);
  const Problem c = check_backward(grad_y, x, weight, masked ? grad_y : saved, act, slope, need_x, need_weight);
  if (masked) {
    check_mask(device, c);
    check_place(saved, "the mask", grad_y, "grad_y", "linear_act");
    const std::vector<int64_t> sizes = resized_last(grad_y, c.shape.n / kMaskBits);
    TORCH_CHECK(saved.sizes() == at::IntArrayRef(sizes), "linear_act: expected the mask of grad_y ", grad_y.sizes(),
                " to be ", at::IntArrayRef(sizes), ", got ", saved.sizes());
  }
  const at::ScalarType dtype = grad_y.scalar_type();
  return backward(device, c, grad_y, x, weight, saved,
                  new_gradients(c.shape, grad_y, dtype, dtype, need_x, need_weight, need_bias));
}

at::Tensor linear_act_autocast_forward(const Device& device, const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias, int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope, Dtypes::autocast);
  return forward(device, x, weight, bias, c, Beside::nothing).y;
}

std::tuple<at::Tensor, at::Tensor> linear_act_autocast_forward_z(const Device& device, const at::Tensor& x,
                                                                 const at::Tensor& weight, const OptionalTensor& bias,
                                                                 int64_t act, double slope) {
  const Problem c = check_forward(x, weight, bias, act, slope, Dtypes::autocast);
  const Outputs out = forward(device, x, weight, bias, c, Beside::z);
  return {out.y, out.z};
}

Gradients linear_act_autocast_backward(const Device& device, const at::Tensor& grad_y, const OptionalTensor& x,
                                       const OptionalTensor& weight, const at::Tensor& saved, at::ScalarType x_dtype,
                                       int64_t act, double slope, bool need_x, bool need_weight, bool need_bias) {
  const Problem c =
      check_backward(grad_y, x, weight, saved, act, slope, need_x, need_weight, Dtypes::autocast, x_dtype);
  return backward(device, c, grad_y, x, weight, saved,
                  new_gradients(c.shape, grad_y, x_dtype, at::kFloat, need_x, need_weight, need_bias));
}

}  // namespace dlk
