// Host code that the CPU losses share: the weights of classes and the denominator of a mean.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <vector>

#include "kernels/cpu/losses/loss_kernels.h"
#include "ops/tensors.h"

namespace dlk::cpu {

// Write the value of a 0-dimensional tensor, rounded to its dtype.
inline void write_rounded(const at::Tensor& t, double value) {
  void* const to = t.data_ptr();
  switch (t.scalar_type()) {
    case at::kDouble: *static_cast<double*>(to) = value; break;
    case at::kFloat: *static_cast<float*>(to) = static_cast<float>(value); break;
    case at::kBFloat16: *static_cast<c10::BFloat16*>(to) = static_cast<float>(value); break;
    default: *static_cast<c10::Half*>(to) = static_cast<float>(value);
  }
}

// `each` where there is no reduction, else the sum of the slices, for the mean over `denominator`.
inline at::Tensor reduced(const at::Tensor& each, const std::vector<double>& sums, at::Reduction::Reduction reduction,
                          double denominator, const at::TensorOptions& options) {
  if (reduction == at::Reduction::None) return each;
  ExactSum total;
  for (double sum : sums) total.add(sum);
  const double value = total.value();
  // Values beyond the dtype's range become infinity, as where torch converts a tensor.
  const at::Tensor loss = new_empty({}, options);
  write_rounded(loss, reduction == at::Reduction::Mean ? value / denominator : value);
  return loss;
}

// f(class) for the weight of a class; 1 without weights.
template <class F>
auto with_weights(const at::Tensor& weight, F&& f) {
  if (!weight.defined()) return f([](int64_t) { return 1.0; });
  if (weight.scalar_type() == at::kDouble) return f([w = weight.const_data_ptr<double>()](int64_t c) { return w[c]; });
  return f([w = weight.const_data_ptr<float>()](int64_t c) { return double(w[c]); });
}

inline double weight_sum(const at::Tensor& weight, int64_t classes) {
  if (!weight.defined()) return classes;
  return with_weights(weight, [&](auto weight_of) {
    ExactSum sum;
    for (int64_t c = 0; c < classes; ++c) sum.add(weight_of(c));
    return sum.value();
  });
}

// The denominator of a mean: the sum of the weights of the targets that count. Checks every class index on the way.
inline double checked_denominator(const at::Tensor& target, const at::Tensor& weight, int64_t classes,
                                  int64_t ignore_index, const char* op) {
  return with_weights(weight, [&](auto weight_of) {
    const int64_t* index = target.const_data_ptr<int64_t>();
    ExactSum sum;
    for (int64_t i = 0, n = target.numel(); i < n; ++i) {
      const int64_t t = index[i];
      if (t == ignore_index) continue;
      TORCH_CHECK_INDEX(t >= 0 && t < classes, op, ": Target ", t, " is out of bounds: expected a class index in [0, ",
                        classes, ") or ignore_index = ", ignore_index);
      sum.add(weight_of(t));
    }
    return sum.value();
  });
}

}  // namespace dlk::cpu
