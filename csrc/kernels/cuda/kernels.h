// The interface of the CUDA kernels. No torch here: raw pointers and a stream in, a status out.
//
// csrc/ops calls these functions; csrc/planning includes no CUDA. Everything runs on the stream that it is given, on
// the current device. Nothing is synchronised or allocated, so that every call can be captured in a CUDA graph. All
// pointers are device memory. Sizes may be 0: a sum over nothing is 0, and an empty output launches nothing. A kernel
// returns cudaErrorInvalidValue for a call that it does not take.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/loss_params.h"
#include "kernels/params.h"

namespace dlk::cuda {

// ---- products ------------------------------------------------------------------------------------------------------

// One product (params.h), with what CUDA adds: activation masks, which are 16-byte aligned, and column sums.
struct Gemm : dlk::Gemm {
  void* mask;          // receives the activation mask of c, or nullptr; c and bias are 16-byte aligned then
  bool saved_is_mask;  // `saved` is an activation mask; its strides are those of y, in bits
  bool below_is_mask;  // `below_saved` is an activation mask
  void* column_sum;    // with below_saved: [n], receives the column sums of c, dbias of the layer below; or nullptr
  int tile;            // side of the tile of C of mma_gemm, or columns of the tile of hopper_gemm; 0: by the size of C
};

// Return the accumulators of `partials`: the slices of C and of the row sums, or the parts of the column sums.
int64_t partials_size(const Gemm&);

// Return how many k-slices fill the device when C is small and k is long: a function of the shape alone, so that the
// bits are the same on every run.
int gemm_splits(int64_t m, int64_t n, int64_t k);

// The same for a C of few rows (forward, dgrad), whose tiles lie side by side: without slices 32, 3136→512 would run on 8
// SMs.
int few_rows_splits(int64_t m, int64_t n, int64_t k);

// The product on plain FMAs: f32 and f64, any shape and stride. No masks, no column sums.
cudaError_t simt_gemm(const Gemm& p, cudaStream_t stream);

// The product on tensor cores (sm_80 and later): bf16 and fp16, any shape and stride. It is fast where both operands pass
// mma_takes_fast: contiguous along one dimension and 16-byte aligned. tile: 64 or 128.
cudaError_t mma_gemm(const Gemm& p, cudaStream_t stream);
bool mma_takes_fast(const View& operand);

// The product by TMA and wgmma: bf16 and fp16, on Hopper alone, where the library was built for sm_90a. tile: 128 or
// 256 columns; a tile has 128 rows. It has not run on a GPU yet.
//
// hopper_takes: C and k are not empty, there is no `saved` and no row sum, and the operands are laid out as in forward,
// dgrad or wgrad of contiguous tensors, 16-byte aligned, with rows a multiple of 8 elements apart.
//
// hopper_available: the current device and the library can run it; otherwise hopper_gemm returns
// cudaErrorNoKernelImageForDevice.
cudaError_t hopper_gemm(const Gemm& p, cudaStream_t stream);
bool hopper_takes(const Gemm& p);
bool hopper_available();

// ---- elementwise passes --------------------------------------------------------------------------------------------

// y = act(z) behind a library's product.
struct ActPass : dlk::ActPass {
  void* mask;  // receives the activation mask of y, or nullptr
};
cudaError_t act_pass(DType dtype, const ActPass& p, cudaStream_t stream);

// dz and dbias in one pass. `saved` may be null for Act::none.
struct GradPass : dlk::GradPass {
  bool saved_is_mask;  // as in Gemm
};
cudaError_t grad_pass(const GradPass& p, cudaStream_t stream);
// Return the accumulators of `partials`.
int64_t grad_pass_partials(const GradPass& p);

// The passes of a gated layer. glu_grad_pass reads no `up` that has no data where dz_gate and dbias_gate are not wanted, and
// no `gate` that has none where the activation is none and nothing of up is wanted.
cudaError_t glu_pass(DType dtype, const GluPass& p, cudaStream_t stream);
cudaError_t glu_grad_pass(const GluGradPass& p, cudaStream_t stream);
// Return the accumulators of `partials`.
int64_t glu_grad_pass_partials(const GluGradPass& p);

// ---- losses --------------------------------------------------------------------------------------------------------
// No call waits for the device, so an error that is found there cannot be raised. A negative var, or a class index out
// of range, makes NaN of its own term and of its gradients. Such an index also makes NaN of a mean. It reads and writes
// no memory out of bounds.

// Doubles of `sums`, and the place and number of those that hold parts of the mean's denominator.
constexpr int64_t kLossScratch = 1536;
constexpr int64_t kLossCountsAt = 1024, kLossCounts = 256;

struct ElementwiseLoss : dlk::ElementwiseLoss {
  DType dtype;
  void* reduced;  // [] receives Σ loss / divisor, or nullptr
};

// Class indices are not checked, and weight_sum is not read.
struct CrossEntropy : dlk::CrossEntropy {
  DType dtype;
  // With class indices: divide by the sum of the weights of the targets that count, which is made on the device. scale
  // is not read.
  bool mean;
  void* reduced;  // [] receives Σ loss over that denominator, otherwise Σ loss · scale; or nullptr
  // For calls that have only some rows of a loss (linear_cross_entropy):
  bool in_place;     // grad overwrites x, rounded to its dtype, and loss receives accumulators
  int64_t counted;   // the rows that count_targets added up, all rows of the loss; 0: this call has all rows
  const void* lift;  // [] an accumulator: a factor of scale; or nullptr
};

cudaError_t squared_error(const ElementwiseLoss& p, cudaStream_t stream);
cudaError_t gaussian_nll(const ElementwiseLoss& p, cudaStream_t stream);
cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream);
// Add up the weights of the targets in `sums`, before calls with some rows each that share these `sums`.
cudaError_t count_targets(const CrossEntropy& p, cudaStream_t stream);

// ---- the fused MLP -------------------------------------------------------------------------------------------------
// Layers of 1 to 128 features each, in bf16, fp16 or fp32 (exact, no TF32). In forward all weights must fit in the
// shared memory of a block, in backward one layer and a block of its rows. How layers and rows are divided depends on
// the shapes and on the device alone, so the same inputs give the same bits.

// Return whether the current device can run forward and backward of p.
bool fused_mlp_takes(const FusedMlp& p, DType dtype);
cudaError_t fused_mlp_forward(const FusedMlp& p, DType dtype, cudaStream_t stream);
// Needs the slices and the f32 partials that these two functions return. Takes an activation mask if p has one layer.
cudaError_t fused_mlp_backward(const FusedMlp& p, DType dtype, cudaStream_t stream);
int fused_mlp_slices(const FusedMlp& p, DType dtype);
int64_t fused_mlp_partials(const FusedMlp& p, DType dtype);

}  // namespace dlk::cuda
