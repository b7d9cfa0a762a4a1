// What the CUDA kernels offer. No torch here: raw pointers and a stream in, a status out.
//
// Everything runs on the stream it is given, of the current device; nothing is synchronised or allocated, so that any
// of it can be captured in a CUDA graph. All pointers are device memory. Sizes may be 0: sums over nothing are 0, and
// an empty output launches nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"

namespace dlk::cuda {

struct Gemm : dlk::Gemm {
  // With a gate: [n] sums of c's columns, dbias of the layer below; or nullptr.
  void* column_sum;
  int tile;  // tensor cores: side of a block's tile of C, 64 or 128; 0: by the size of C
};

// Scratch that `partials` must hold, in accumulators: slices of C and of the row sums, or of the column sums.
int64_t partials_size(const Gemm&);

// Any shape, stride and dtype, on plain FMAs. No column sums.
cudaError_t simt_gemm(const Gemm& p, cudaStream_t stream);

// bf16, fp16, and fp32 rounded to TF32, on tensor cores (sm_80 and later). Any shape and stride, and fast where an
// operand lies contiguous along one of its dimensions and 16-byte aligned (`takes_fast`).
cudaError_t mma_gemm(const Gemm& p, cudaStream_t stream);
bool mma_takes_fast(const View& operand, DType dtype);

// The same products by TMA and wgmma, on compute capability 9.0. Its operands are aligned and contiguous along one
// dimension, without masks in the load and without row sums (`hopper_takes`).
cudaError_t hopper_gemm(const Gemm& p, cudaStream_t stream);

// dz and dbias in one pass over g and saved; dbias in two stages, in a fixed order.
cudaError_t grad_pass(const GradPass& p, cudaStream_t stream);
int64_t grad_pass_partials(const GradPass& p);  // accumulators of scratch

cudaError_t act_pass(DType dtype, const ActPass& p, cudaStream_t stream);

// How many slices k is cut in, so that a small C with a long k still fills the device: a function of the shape alone,
// hence the same bits on every run.
int gemm_splits(int64_t m, int64_t n, int64_t k);

// A chain of layers of 1 to 128 features each, in bf16, fp16 or (exact, no TF32) fp32: where all weights fit in a block's
// shared memory, and in backward a layer with the sums of its gradients. How a chain is cut depends on its shape and on
// the device, and on nothing else: the same inputs give the same bits.
bool chain_takes(const Chain& p, DType dtype);
cudaError_t chain_forward(const Chain& p, DType dtype, cudaStream_t stream);
// Wants `slices` and `partials` of these sizes, the latter in f32.
int chain_slices(const Chain& p, DType dtype);
int64_t chain_partials(const Chain& p, DType dtype);
cudaError_t chain_backward(const Chain& p, DType dtype, cudaStream_t stream);

}  // namespace dlk::cuda
