// The interface of a CPU kernel set. There is one set per instruction set (ukernel_*.cpp), each compiled
// from the same gemm.h; isa.cpp picks one at run time. No torch here: threads arrive as a callback.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/params.h"
#include "kernels/cpu/losses/loss_kernels.h"

namespace dlk::cpu {

// Runs body(begin, end) over [0, tasks), split among threads; returns when all are done.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, const void* context, void (*body)(const void* context, int64_t begin, int64_t end));
};

constexpr int kFusedMlpLayers = 16;
// Accumulators of one slice: per layer dweight and behind it dbias, in rows of whole registers of any instruction set.
DLK_HD int64_t fused_mlp_pitch(int64_t features) { return (features + 15) / 16 * 16; }
int64_t fused_mlp_parameters(const FusedMlp&);

// Where packing weight would cost more than it saves.
constexpr int64_t kFewRowsForward = 32;
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewDz = 1 << 18;  // elements of dz that every thread then makes for itself: 1 MiB

// Few columns: a product reads rows of x, not weight. Dot products and outer products of them, without packing.
constexpr int64_t kFewColumns = 16;
// Backward of such a layer in one pass over the rows: the gradients that are set.
struct ColumnsBackward {
  int64_t m, n, k;
  View g, saved;  // [m, n]; saved as in Gemm
  Activation act;
  View weight;     // [n, k], contiguous along k; for dx
  View x;          // [m, k], likewise; for dweight
  void* dx;        // [m, k] contiguous, or nullptr
  void* dweight;   // [n, k] contiguous, or nullptr
  void* dbias;     // [n], or nullptr
  void* partials;  // column_slices(m) > 1: scratch of as many times n * (k + 1) accumulators, for dweight and dbias
};
// In how many slices its rows are cut: a function of the shape alone. One has at least 128 rows, which makes adding it to
// the others cheap, and there are enough for 32 threads.
DLK_HD int64_t column_slices(int64_t m) { return m < 256 ? 1 : m < 32 * 128 ? m / 128 : 32; }

struct PackedProduct {
  void (*gemm)(const Gemm&, const Parallel&);
  int64_t (*panels_size)(const Gemm&, int threads);
  // True if packing leaves values as they are, so that the row sums of A are those of the operand.
  bool exact;
};

// A layer's forward for few rows, and for how many.
struct FewForward {
  void (*run)(const Gemm&, const Parallel&);
  int64_t least_rows, most_rows;
};

// The entry points for one element type.
struct KernelTable {
  const char* ukernel;  // dtype, tile and ISA, as explain() prints it
  void (*act_pass)(const ActPass&, const Parallel&);
  PackedProduct packed;
  // The three products for few rows, without packing. forward: x and weight contiguous along k; dgrad: weight too.
  FewForward few_forward, tiles_forward;            // from tiles_forward.least_rows on that one, where there is one
  void (*few_dgrad)(const Gemm&, const Parallel&);  // M <= kFewRows
  void (*few_wgrad)(const Gemm&, const Parallel&);  // M <= kFewRows
  // The same for few columns: N <= kFewColumns; x and weight contiguous along k.
  void (*few_columns_forward)(const Gemm&, const Parallel&);
  void (*few_columns_backward)(const ColumnsBackward&, const Parallel&);
  void (*grad_pass)(const GradPass&, const Parallel&);
  // Layers of at most fused_mlp_features in and out features.
  int64_t fused_mlp_features;
  void (*fused_mlp_forward)(const FusedMlp&, const Parallel&);
  void (*fused_mlp_backward)(const FusedMlp&, const Parallel&);
  Losses losses;
};

// f32 tensors multiplied in bf16, where torch's settings allow it and the instruction set has such products.
struct InBf16 {
  const char* ukernel;  // nullptr: it has none
  PackedProduct packed;
};

// A layer's three products.
struct PackedLayer {
  PackedProduct forward, dgrad, wgrad;
};
struct FewRowsLayer {
  void (*forward)(const Gemm&, const Parallel&);
  void (*dgrad)(const Gemm&, const Parallel&);
  void (*wgrad)(const Gemm&, const Parallel&);
};

// f32 parameters beside bf16 activations, see autocast.h.
struct AutocastLayer {
  PackedLayer packed;
  FewRowsLayer few_rows;
};
struct Autocast {
  const char* ukernel;  // nullptr: the instruction set has none
  AutocastLayer f32_x, bf16_x;
};

// One instruction set's engines, indexed by DType.
struct Kernels {
  const char* isa;
  KernelTable table[4];
  InBf16 f32_in_bf16;
  Autocast autocast;
};

// How many k slices wgrad uses: a function of the shape alone, so that the bits do not depend on the thread count.
int gemm_splits(int64_t m, int64_t n, int64_t k);
// Accumulators of scratch that `splits` slices need: the slices of C, then those of the row sums.
int64_t partials_size(const Gemm&);

// Slices of the elementwise reduction over m rows; again of the shape alone.
constexpr int64_t kSliceRows = 1024;
DLK_HD int64_t slices(int64_t m) { return (m + kSliceRows - 1) / kSliceRows; }

// Thread-local scratch, 64-byte aligned, kept between calls; at most a few MiB per thread.
void* scratch(size_t bytes);

}  // namespace dlk::cpu
