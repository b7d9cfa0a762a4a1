// The interface of the CPU kernels: the table of functions that one instruction set offers, and their arguments.
//
// Each ukernel_*.cpp compiles the same kernels for one instruction set and fills in one `Kernels`; isa.cpp picks one at
// run time. csrc/planning reads sizes and limits from here, and csrc/ops calls the functions. No torch here: threads
// arrive as a callback (Parallel).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/params.h"
#include "kernels/cpu/losses/loss_kernels.h"

namespace dlk::cpu {

// The threads of a call. run(tasks, context, body) splits [0, tasks) among them, calls body(context, begin, end) for
// each part, and returns when all parts are done.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, const void* context, void (*body)(const void* context, int64_t begin, int64_t end));
};

// ---- scratch of the fused MLP ------------------------------------------------------------------------------------

// The distance between rows of parameter gradients in partials, in accumulators: whole registers of any instruction
// set.
DLK_HD int64_t fused_mlp_pitch(int64_t features) { return (features + 15) / 16 * 16; }
// Return the accumulators of one slice in FusedMlp::partials. Each layer has dweight, [n, pitch of k], and behind it
// dbias.
int64_t fused_mlp_parameters(const FusedMlp&);

// ---- few rows, few columns ---------------------------------------------------------------------------------------

// The most rows (M) of the kernels for few rows. Below them packing weight would cost more than it saves.
constexpr int64_t kFewRowsForward = 32;
constexpr int64_t kFewRowsDgrad = 8;
constexpr int64_t kFewRowsWgrad = 16;
constexpr int64_t kFewDz = 1 << 18;  // the most elements of dz, which every thread makes for itself: 1 MiB of f32

// The most columns (N) of the kernels for few columns, which read rows of x and pack nothing.
constexpr int64_t kFewColumns = 16;

// The backward of a layer with few columns, in one pass over the rows. It makes the gradients whose pointers are set.
struct ColumnsBackward {
  int64_t m, n, k;
  View g, saved;  // [m, n]; as in Gemm
  Activation act;
  View weight;     // [n, k], contiguous along k; for dx
  View x;          // [m, k], contiguous along k; for dweight
  void* dx;        // [m, k] contiguous, or nullptr
  void* dweight;   // [n, k] contiguous, or nullptr
  void* dbias;     // [n], or nullptr
  void* partials;  // column_slices(m) > 1: that many times n * (k + 1) accumulators, for dweight and dbias
};
// Return how many slices the rows are cut in: a function of the shape alone. A slice has at least 128 rows, which makes
// it cheap to add the slices up, and there are enough slices for 32 threads.
DLK_HD int64_t column_slices(int64_t m) { return m < 256 ? 1 : m < 32 * 128 ? m / 128 : 32; }

// ---- the update of parameters -------------------------------------------------------------------------------------

enum class UpdateRule { adam, adamw, sgd };

// One parameter, its gradient and its state: n elements each.
struct UpdatedTensor {
  int64_t n;
  void* p;
  const void* g;
  void* mean;         // exp_avg; of sgd the momentum, or nullptr
  void* square;       // exp_avg_sq; adam and adamw
  void* max_square;   // max_exp_avg_sq: amsgrad; else nullptr
  double step_size;   // adam and adamw: lr / (1 - beta1^step)
  double correction;  // adam and adamw: sqrt(1 - beta2^step)
};

// One optimizer step of some tensors: torch's Adam, AdamW or SGD.
struct Update {
  UpdateRule rule;
  bool maximize, nesterov;
  double lr, weight_decay, beta2, eps, dampening;
  double beta1;  // of sgd the factor of the momentum
  const UpdatedTensor* tensors;
  int64_t count;
};

// ---- the functions of one instruction set ------------------------------------------------------------------------

// A product that packs both operands, and the sizes that planning asks for.
struct PackedProduct {
  void (*gemm)(const Gemm&, const Parallel&);
  int64_t (*panels_size)(const Gemm&, int threads);  // bytes of Gemm::panels; 0: every task packs its own B
  bool exact;  // packing rounds nothing, so that row sums of packed A are row sums of A
};

// A forward for few rows of x, and the numbers of rows that it is for.
struct FewForward {
  void (*run)(const Gemm&, const Parallel&);
  int64_t least_rows, most_rows;
};

// The fused MLP: narrow layers one after the other for a block of rows.
struct FusedMlpKernels {
  int64_t features;    // the most in_features and out_features of a layer
  int64_t block_rows;  // the least rows of a block where there are more than two; no slice has fewer
  void (*forward)(const FusedMlp&, const Parallel&);
  void (*backward)(const FusedMlp&, const Parallel&);
};

// The kernels for one element type.
struct KernelTable {
  const char* ukernel;  // dtype, micro-tile and instruction set, as explain() prints them
  void (*act_pass)(const ActPass&, const Parallel&);
  void (*bias_act_pass)(const BiasActPass&, const Parallel&);
  void (*derivative_pass)(const DerivativePass&, const Parallel&);
  PackedProduct packed;
  // Few rows, nothing packed. forward needs x and weight contiguous along k, dgrad needs weight contiguous along k.
  FewForward few_forward;
  FewForward tiles_forward;  // takes over from tiles_forward.least_rows on; run == nullptr: there is none
  void (*few_dgrad)(const Gemm&, const Parallel&);  // M <= kFewRowsDgrad
  void (*few_wgrad)(const Gemm&, const Parallel&);  // M <= kFewRowsWgrad
  // Few columns, N <= kFewColumns; x and weight contiguous along k.
  void (*few_columns_forward)(const Gemm&, const Parallel&);
  void (*few_columns_backward)(const ColumnsBackward&, const Parallel&);
  void (*grad_pass)(const GradPass&, const Parallel&);
  void (*glu_pass)(const GluPass&, const Parallel&);
  void (*glu_grad_pass)(const GluGradPass&, const Parallel&);
  FusedMlpKernels fused_mlp;
  Losses losses;
  void (*update)(const Update&, const Parallel&);  // nullptr: of 16-bit types
  // Multiply-adds on registers alone: `steps` steps on this thread. Returns their operations, for the benchmark.
  int64_t (*peak_loop)(int64_t steps);
};

// The product of f32 tensors that rounds them to bf16 while it packs them, for callers that torch's settings allow it.
struct InBf16 {
  const char* ukernel;  // nullptr: the instruction set has no bf16 products
  PackedProduct packed;
};

// The packed products of one layer, where their operands have different types.
struct PackedLayer {
  PackedProduct forward, dgrad, wgrad;
};
// The products of one layer for few rows, likewise.
struct FewRowsLayer {
  void (*forward)(const Gemm&, const Parallel&);
  void (*dgrad)(const Gemm&, const Parallel&);
  void (*wgrad)(const Gemm&, const Parallel&);
};

// All products of a layer under autocast: f32 parameters beside bf16 activations (autocast.h).
struct AutocastLayer {
  PackedLayer packed;
  FewRowsLayer few_rows;
};
struct Autocast {
  const char* ukernel;          // nullptr: the instruction set has no bf16 products
  AutocastLayer f32_x, bf16_x;  // by the type of x
};

// All kernels of one instruction set.
struct Kernels {
  const char* isa;
  KernelTable table[4];  // indexed by DType
  InBf16 f32_in_bf16;
  Autocast autocast;
};

// ---- how sums are cut: functions of shapes alone, so that the bits do not depend on the number of threads ---------

// Return the number of k-slices of a wgrad with C [m, n].
int gemm_splits(int64_t m, int64_t n, int64_t k);
// Return the accumulators of Gemm::partials: the slices of C, then the slices of the row sums.
int64_t partials_size(const Gemm&);

// The rows of a slice of GradPass: a 32nd of all, but at least 32 and at most 1024. Threads take whole slices, as the products
// behind them take whole rows: where each took half of the columns of every row, a backward of 1024x256 (two threads, a Xeon)
// spent 1.7 times as long.
DLK_HD int64_t slice_rows(int64_t m) {
  const int64_t part = (m + 511) / 512 * 16;  // whole blocks of ColumnSum
  return part < 32 ? 32 : part > 1024 ? 1024 : part;
}
DLK_HD int64_t slices(int64_t m) { return (m + slice_rows(m) - 1) / slice_rows(m); }

// Return scratch of this thread, 64-byte aligned, valid until the thread's next call. It is kept between calls, and is
// at most a few MiB per thread.
void* scratch(size_t bytes);

}  // namespace dlk::cpu
