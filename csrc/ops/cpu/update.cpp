// The update of parameters on CPU, and its comparison with torch's kernel.
#include "ops/update.h"

#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "ops/aten.h"
#include "ops/check.h"
#include "ops/cpu/device.h"

namespace dlk::cpu {
namespace {

double step_of(const at::Tensor& step) {
  return step.scalar_type() == at::kDouble ? static_cast<float>(*step.const_data_ptr<double>())
                                           : *step.const_data_ptr<float>();
}

void* data_at(const std::vector<at::Tensor>& tensors, size_t i) {
  return i < tensors.size() ? tensors[i].data_ptr() : nullptr;
}

// Values that fill a mantissa, some below 0. torch's random numbers are not drawn: their sequence is the user's.
at::Tensor sample(int64_t n, at::ScalarType dtype, int which, bool positive) {
  const at::Tensor values = aten::empty({n}, at::TensorOptions().dtype(at::kDouble));
  double* data = values.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) data[i] = std::sin(1.0 + 12.9898 * i + 78.233 * which);
  return positive ? values.abs().to(dtype) : values.to(dtype);
}

// A group of tensors of whole registers, a part of one, and both.
OptimizerGroup sample_group(at::ScalarType dtype, UpdateRule rule, int settings) {
  auto has = [&](int bit) { return (settings >> bit & 1) != 0; };
  const bool sgd = rule == UpdateRule::sgd;
  OptimizerGroup g{};
  g.rule = rule;
  g.maximize = has(0);
  g.weight_decay = has(1) ? 0.3 : 0;
  g.amsgrad = !sgd && has(2);
  g.nesterov = sgd && has(2);
  g.beta1 = has(3) ? (sgd ? 0 : 0.4) : 0.9;
  g.beta2 = 0.7, g.lr = 0.013, g.eps = 1e-8;
  g.dampening = g.nesterov ? 0 : 0.2;
  int which = 0;
  for (const int64_t n : {64, 7, 203}) {
    g.parameters.push_back(sample(n, dtype, which++, false));
    if (!sgd || g.beta1 != 0) g.means.push_back(sample(n, dtype, which++, false));
    if (sgd) continue;
    g.squares.push_back(sample(n, dtype, which++, true));
    if (g.amsgrad) g.max_squares.push_back(sample(n, dtype, which++, true));
    g.steps.push_back(aten::scalar_tensor(7, at::TensorOptions().dtype(at::kFloat)));
  }
  return g;
}

bool same_bits(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(a[i].const_data_ptr(), b[i].const_data_ptr(), a[i].nbytes()) != 0) return false;
  return true;
}

bool has_bits_of_torch(at::ScalarType dtype, UpdateRule rule) {
  for (int settings = 0; settings < 16; ++settings) {
    OptimizerGroup ours = sample_group(dtype, rule, settings), torchs = sample_group(dtype, rule, settings);
    std::vector<at::Tensor> grads;
    for (const at::Tensor& p : ours.parameters) grads.push_back(sample(p.numel(), dtype, 100, false));
    if (!update_by_kernel(ours, grads)) return false;
    update_by_torch(torchs, grads);
    if (!same_bits(ours.parameters, torchs.parameters) || !same_bits(ours.means, torchs.means) ||
        !same_bits(ours.squares, torchs.squares) || !same_bits(ours.max_squares, torchs.max_squares))
      return false;
  }
  return true;
}

}  // namespace

bool update_by_kernel(const OptimizerGroup& g, at::TensorList grads) {
  const DType dtype = dtype_of(g.parameters[0], "update");
  const Machine machine = machine_for(dtype, false);
  const auto kernel = machine.table(dtype).update;
  if (!kernel) return false;
  std::vector<UpdatedTensor> tensors;
  tensors.reserve(g.parameters.size() * g.members);
  int64_t elements = 0;
  for (size_t i = 0; i < g.parameters.size(); ++i) {
    const at::Tensor& p = g.parameters[i];
    UpdatedTensor t = {p.numel() / g.members, p.data_ptr(),          grads[i].const_data_ptr(),
                       data_at(g.means, i),   data_at(g.squares, i), data_at(g.max_squares, i)};
    if (g.rule != UpdateRule::sgd) {
      const double step = step_of(g.steps[i]);
      t.step_size = g.lr / (1 - std::pow(g.beta1, step));
      t.correction = std::sqrt(1 - std::pow(g.beta2, step));
    }
    elements += p.numel();
    const int64_t bytes = t.n * p.element_size();
    for (int64_t e = 0; e < g.members; ++e) {
      tensors.push_back(t);
      for (void** data : {&t.p, &t.mean, &t.square, &t.max_square})
        if (*data) *data = static_cast<char*>(*data) + bytes;
      t.g = static_cast<const char*>(t.g) + bytes;
    }
  }
  Update u = {g.rule, g.maximize, g.nesterov, g.lr, g.weight_decay, g.beta2, g.eps, g.dampening, g.beta1};
  u.tensors = tensors.data(), u.count = tensors.size();
  kernel(u, threads_for_elements(machine, elements));
  return true;
}

bool updates_like_torch(at::ScalarType dtype, UpdateRule rule) {
  static std::mutex mutex;
  static std::map<std::pair<at::ScalarType, UpdateRule>, bool> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find({dtype, rule});
  if (found != known.end()) return found->second;
  return known[{dtype, rule}] = has_bits_of_torch(dtype, rule);
}

}  // namespace dlk::cpu
