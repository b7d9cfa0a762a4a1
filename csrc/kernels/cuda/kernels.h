// The interface of the CUDA kernels. No torch here: raw pointers and a stream in, a status out.
//
// Everything runs on the stream it is given, of the current device; nothing is synchronised or allocated, so that any
// of it can be captured in a CUDA graph. All pointers are device memory. Sizes may be 0: sums over nothing are 0, and
// an empty output launches nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/loss_params.h"
#include "kernels/params.h"

namespace dlk::cuda {

// Masks are 16-byte aligned.
struct Gemm : dlk::Gemm {
  void* mask;          // of c, or nullptr; c and bias are 16-byte aligned then
  bool saved_is_mask;  // `saved` is a mask, and the view that of y which it stands for: its strides count bits
  bool below_is_mask;  // `below_saved` is a mask
  // With below_saved: [n] sums of c's columns, dbias of the layer below; or nullptr.
  void* column_sum;
  int tile;  // tensor cores: side of a block's tile of C, 64 or 128; 0: by the size of C
};

// Scratch that `partials` must hold, in accumulators: slices of C and of the row sums, or of the column sums.
int64_t partials_size(const Gemm&);

// Any shape, stride and dtype, on plain FMAs. No column sums.
cudaError_t simt_gemm(const Gemm& p, cudaStream_t stream);

// bf16, fp16, and fp32 rounded to TF32, on tensor cores (sm_80 and later). Any shape and stride, and fast where an
// operand lies contiguous along one of its dimensions and 16-byte aligned (`mma_takes_fast`).
cudaError_t mma_gemm(const Gemm& p, cudaStream_t stream);
bool mma_takes_fast(const View& operand, DType dtype);

// bf16 and fp16 by TMA and wgmma, on Hopper alone and where the library was built for sm_90a (`hopper_available`, of the
// current device; else cudaErrorNoKernelImageForDevice). `hopper_takes`: no empty C or k, no `saved`, no row sums, and
// operands that lie as in forward, dgrad or wgrad of contiguous tensors, 16-byte aligned, rows of a multiple of 8 elements
// apart. `tile`: columns of a block's tile of 128 rows, 128 or 256; 0: by the size of C. Has not run on a GPU yet.
cudaError_t hopper_gemm(const Gemm& p, cudaStream_t stream);
bool hopper_takes(const Gemm& p);
bool hopper_available();

struct ActPass : dlk::ActPass {
  void* mask;  // of y, or nullptr
};
cudaError_t act_pass(DType dtype, const ActPass& p, cudaStream_t stream);

// How many slices k is cut in, so that a small C with a long k still fills the device: a function of the shape alone,
// hence the same bits on every run.
int gemm_splits(int64_t m, int64_t n, int64_t k);

struct GradPass : dlk::GradPass {
  bool saved_is_mask;  // as in Gemm
};
// dz and dbias in one pass. `saved` may be null for Act::none. `partials` holds grad_pass_partials() accumulators.
cudaError_t grad_pass(const GradPass& p, cudaStream_t stream);
int64_t grad_pass_partials(const GradPass& p);

// The losses. Nothing waits for the device, so nothing that is found there can be raised: a negative var and a class
// index out of range make NaN of their own term and gradients, the index also of a mean, and reach no memory.
constexpr int64_t kLossScratch = 1536;                      // doubles that `sums` must hold
constexpr int64_t kLossCountsAt = 1024, kLossCounts = 256;  // where the parts of a mean's denominator are

struct ElementwiseLoss : dlk::ElementwiseLoss {
  DType dtype;
  void* reduced;  // [] Σ loss / divisor, or nullptr
};

// Indices are not checked, weight_sum is not read.
struct CrossEntropy : dlk::CrossEntropy {
  DType dtype;
  bool mean;      // class indices: over the weights of those that count, added up here; scale is not read
  void* reduced;  // [] Σ loss over that denominator, else Σ loss · scale; or nullptr
  // For a block of a call's rows:
  bool in_place;     // grad takes x's place, rounded to its dtype, and loss takes accumulators
  int64_t counted;   // rows that count_targets added up, all of the call's; 0: these rows are all
  const void* lift;  // [] an accumulator that scale is multiplied by, or nullptr
};

cudaError_t squared_error(const ElementwiseLoss& p, cudaStream_t stream);
cudaError_t gaussian_nll(const ElementwiseLoss& p, cudaStream_t stream);
cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream);
// Adds up the weights of all targets of a call, in `sums`. Calls for blocks of its rows then use the same `sums`.
cudaError_t count_targets(const CrossEntropy& p, cudaStream_t stream);

// Layers of 1 to 128 features each, in bf16, fp16 or (exact, no TF32) fp32. In forward all weights must fit in a block's shared
// memory, in backward one layer with blocks of its rows. How the work is cut depends on the shapes and the device alone: the
// same inputs give the same bits.
bool fused_mlp_takes(const FusedMlp& p, DType dtype);
cudaError_t fused_mlp_forward(const FusedMlp& p, DType dtype, cudaStream_t stream);
// Wants `slices` and `partials` of these sizes, the latter in f32. Takes a mask if there is one layer.
int fused_mlp_slices(const FusedMlp& p, DType dtype);
int64_t fused_mlp_partials(const FusedMlp& p, DType dtype);
cudaError_t fused_mlp_backward(const FusedMlp& p, DType dtype, cudaStream_t stream);

}  // namespace dlk::cuda
