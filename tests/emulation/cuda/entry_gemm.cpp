// The CUDA products with C signatures, for ctypes.
#include "kernels/cuda/gemm/waves.h"
#include "kernels/cuda/kernels.h"
#include "run.h"

extern "C" {

// Run a product. path: 0 is simt_gemm, others are mma_gemm with tiles of this side.
int gemm(int path, int dtype, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, int64_t a_col,
         const void* saved, int64_t saved_row, int64_t saved_col, const void* b, int64_t b_row, int64_t b_col, int act,
         double slope, const void* bias, void* c, void* z, const void* below_saved, int below_act, void* row_sum,
         void* column_sum, int splits, void* partials, void* mask, int saved_is_mask, int below_is_mask) {
  dlk::cuda::Gemm p{};
  p.dtype = static_cast<dlk::DType>(dtype);
  p.m = m, p.n = n, p.k = k;
  p.a = {a, a_row, a_col};
  p.saved = {saved, saved_row, saved_col};
  p.b = {b, b_row, b_col};
  p.act = {static_cast<dlk::Act>(act), slope};
  p.bias = bias, p.c = c, p.z = z, p.below_saved = below_saved, p.row_sum = row_sum, p.column_sum = column_sum;
  p.below_act = {static_cast<dlk::Act>(below_act), slope};
  p.splits = splits, p.partials = partials;
  p.mask = mask, p.saved_is_mask = saved_is_mask, p.below_is_mask = below_is_mask;
  p.tile = path;
  return run([&] { return path == 0 ? dlk::cuda::simt_gemm(p, nullptr) : dlk::cuda::mma_gemm(p, nullptr); });
}

int gemm_splits(int64_t m, int64_t n, int64_t k) { return dlk::cuda::gemm_splits(m, n, k); }
int takes_large(int64_t large, int64_t small, int ratio, int64_t processors) {
  return dlk::cuda::takes_large(large, small, ratio, processors);
}
int few_rows_splits(int64_t m, int64_t n, int64_t k) { return dlk::cuda::few_rows_splits(m, n, k); }

int act_pass(int dtype, int64_t count, const void* z, int act, double slope, void* y, void* mask) {
  dlk::cuda::ActPass p{};
  p.count = count, p.z = z, p.act = {static_cast<dlk::Act>(act), slope}, p.y = y, p.mask = mask;
  return run([&] { return dlk::cuda::act_pass(static_cast<dlk::DType>(dtype), p, nullptr); });
}

}  // extern "C"
