// grad_pass with C signatures, for ctypes.
#include "cuda/kernels.h"

namespace {

dlk::GradPass described(int dtype, int64_t m, int64_t n, const void* g, int64_t g_row, int64_t g_col, const void* saved,
                        int64_t saved_row, int64_t saved_col, int act, double slope, void* dz, void* dbias,
                        void* partials) {
  dlk::GradPass p{};
  p.dtype = static_cast<dlk::DType>(dtype);
  p.m = m, p.n = n;
  p.g = {g, g_row, g_col};
  p.saved = {saved, saved_row, saved_col};
  p.act = {static_cast<dlk::Act>(act), slope};
  p.dz = dz, p.dbias = dbias, p.partials = partials;
  return p;
}

}  // namespace

extern "C" {

int grad_pass(int dtype, int64_t m, int64_t n, const void* g, int64_t g_row, int64_t g_col, const void* saved,
              int64_t saved_row, int64_t saved_col, int act, double slope, void* dz, void* dbias, void* partials) {
  return dlk::cuda::grad_pass(
      described(dtype, m, n, g, g_row, g_col, saved, saved_row, saved_col, act, slope, dz, dbias, partials), nullptr);
}

// With dbias.
int64_t grad_pass_partials(int dtype, int64_t m, int64_t n) {
  int any;
  return dlk::cuda::grad_pass_partials(
      described(dtype, m, n, nullptr, 0, 0, nullptr, 0, 0, 0, 0, nullptr, &any, nullptr));
}

}  // extern "C"
