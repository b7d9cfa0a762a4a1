// The gradient pass and the losses with C signatures, for ctypes.
#include "kernels/cuda/kernels.h"
#include "run.h"

namespace {

dlk::cuda::GradPass described(int dtype, int64_t m, int64_t n, const void* g, int64_t g_row, int64_t g_col,
                              const void* saved, int64_t saved_row, int64_t saved_col, int act, double slope, void* dz,
                              void* dbias, void* partials, bool saved_is_mask = false) {
  dlk::cuda::GradPass p{};
  p.dtype = static_cast<dlk::DType>(dtype);
  p.m = m, p.n = n;
  p.g = {g, g_row, g_col};
  p.saved = {saved, saved_row, saved_col};
  p.act = {static_cast<dlk::Act>(act), slope};
  p.dz = dz, p.dbias = dbias, p.partials = partials;
  p.saved_is_mask = saved_is_mask;
  return p;
}

}  // namespace

extern "C" {

int grad_pass(int dtype, int64_t m, int64_t n, const void* g, int64_t g_row, int64_t g_col, const void* saved,
              int64_t saved_row, int64_t saved_col, int act, double slope, void* dz, void* dbias, void* partials,
              int saved_is_mask) {
  const auto p = described(dtype, m, n, g, g_row, g_col, saved, saved_row, saved_col, act, slope, dz, dbias, partials,
                           saved_is_mask);
  return run([&] { return dlk::cuda::grad_pass(p, nullptr); });
}

// The partials of a call with dbias.
int64_t grad_pass_partials(int dtype, int64_t m, int64_t n) {
  int any;
  return dlk::cuda::grad_pass_partials(
      described(dtype, m, n, nullptr, 0, 0, nullptr, 0, 0, 0, 0, nullptr, &any, nullptr));
}

// Views are contiguous except for g. dz_pitch: the distance between rows of both dz.
int glu_grad_pass(int dtype, int64_t m, int64_t n, const void* g, int64_t g_row, int64_t g_col, const void* gate,
                  const void* up, int act, double slope, void* dz_gate, void* dz_up, int64_t dz_pitch, void* dbias_gate,
                  void* dbias_up, void* partials) {
  const dlk::GluGradPass p = {static_cast<dlk::DType>(dtype),
                              m,
                              n,
                              {g, g_row, g_col},
                              {gate, n, 1},
                              {up, n, 1},
                              {static_cast<dlk::Act>(act), slope},
                              dz_gate,
                              dz_up,
                              dz_pitch,
                              dbias_gate,
                              dbias_up,
                              partials};
  return dlk::cuda::glu_grad_pass(p, nullptr);
}

int64_t glu_grad_pass_partials(int dtype, int64_t m, int64_t n, int with_gate, int with_up) {
  int any;
  dlk::GluGradPass p{};
  p.dtype = static_cast<dlk::DType>(dtype), p.m = m, p.n = n;
  p.dbias_gate = with_gate ? &any : nullptr, p.dbias_up = with_up ? &any : nullptr;
  return dlk::cuda::glu_grad_pass_partials(p);
}

int glu_pass(int dtype, int64_t m, int64_t n, const void* gate, const void* up, int64_t pitch, int act, double slope,
             void* y) {
  return dlk::cuda::glu_pass(static_cast<dlk::DType>(dtype),
                             {m, n, gate, up, pitch, {static_cast<dlk::Act>(act), slope}, y}, nullptr);
}

int64_t loss_scratch() { return dlk::cuda::kLossScratch; }

// The Gaussian loss; without var the squared error.
int elementwise_loss(int dtype, int64_t rows, int64_t cols, const void* x, int64_t x_row, int64_t x_col, const void* t,
                     int64_t t_row, int64_t t_col, const void* var, int64_t var_row, int64_t var_col, double eps,
                     double constant, double divisor, void* loss, void* grad_input, void* grad_var, double* sums,
                     void* reduced) {
  dlk::cuda::ElementwiseLoss p{};
  p.dtype = static_cast<dlk::DType>(dtype);
  p.rows = rows, p.cols = cols;
  p.input = {x, x_row, x_col}, p.target = {t, t_row, t_col}, p.var = {var, var_row, var_col};
  p.eps = eps, p.constant = constant, p.divisor = divisor;
  p.loss = loss, p.grad_input = grad_input, p.grad_var = grad_var, p.sums = sums, p.reduced = reduced;
  return run([&] { return var ? dlk::cuda::gaussian_nll(p, nullptr) : dlk::cuda::squared_error(p, nullptr); });
}

int cross_entropy(int dtype, int64_t outer, int64_t classes, int64_t inner, const void* x, int64_t x_outer,
                  int64_t x_cls, int64_t x_inner, const int64_t* target, int64_t ignore_index, const void* soft,
                  int64_t soft_outer, int64_t soft_cls, int64_t soft_inner, const void* weight, double smoothing,
                  int mean, double scale, void* loss, void* grad, void* grad_soft, int64_t grad_outer, int64_t grad_cls,
                  int64_t grad_inner, double* sums, void* reduced) {
  dlk::cuda::CrossEntropy p{};
  p.dtype = static_cast<dlk::DType>(dtype);
  p.outer = outer, p.classes = classes, p.inner = inner;
  p.x = x, p.x_strides = {x_outer, x_cls, x_inner};
  p.target = target, p.ignore_index = ignore_index;
  p.soft = soft, p.soft_strides = {soft_outer, soft_cls, soft_inner};
  p.weight = weight, p.smoothing = smoothing, p.mean = mean, p.scale = scale;
  p.loss = loss, p.grad = grad, p.grad_soft = grad_soft, p.grad_strides = {grad_outer, grad_cls, grad_inner};
  p.sums = sums, p.reduced = reduced;
  return run([&] { return dlk::cuda::cross_entropy(p, nullptr); });
}

}  // extern "C"
