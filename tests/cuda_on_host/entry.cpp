// dlk::cuda::gemm with a C signature, for ctypes.
#include "cuda/kernels.h"

extern "C" int gemm(int dtype, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_col,
                    const void* saved, int64_t saved_row, int64_t saved_col, const void* b, int64_t b_row,
                    int64_t b_col, int act, double slope, const void* bias, void* c, void* z, void* row_sum, int splits,
                    void* partials) {
  dlk::cuda::Gemm p{};
  p.dtype = static_cast<dlk::DType>(dtype);
  p.m = m, p.n = n, p.k = k;
  p.a = {a, a_row, a_col};
  p.saved = {saved, saved_row, saved_col};
  p.b = {b, b_row, b_col};
  p.act = {static_cast<dlk::Act>(act), slope};
  p.bias = bias, p.c = c, p.z = z, p.row_sum = row_sum;
  p.splits = splits, p.partials = partials;
  return dlk::cuda::gemm(p, nullptr);
}

extern "C" int gemm_splits(int64_t m, int64_t n, int64_t k) { return dlk::cuda::gemm_splits(m, n, k); }
