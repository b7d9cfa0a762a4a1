// What a CPU kernel set offers, and the call it answers. One set per instruction set (ukernel_*.cpp), each compiled
// from the same gemm.h; isa.cpp picks one at run time. No torch here: threads arrive as a callback.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activation.h"
#include "../params.h"
#include "loss_kernels.h"

namespace dlk::cpu {

// Runs body(begin, end) over [0, tasks), split among threads; returns when all are done.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, const void* context, void (*body)(const void* context, int64_t begin, int64_t end));
};

// Where a product goes: rounded to its dtype, as the accumulators it was made in, or added to accumulators that are there.
enum class Store : int32_t { rounded, accumulators, added };

// The three products of one layer are one problem: C[m, n] = A[m, k] · B[k, n].
//
//            A                      B              C
//   forward  x  [M, K]              weightᵀ [K, N]  y  [M, N]   epilogue: bias, activation
//   dgrad    dz [M, N]              weight [N, K]   dx [M, K]
//   wgrad    dzᵀ [N, M]             x [M, K]        dw [N, K]   row sums of A: dbias [N]
//
// dz = g · act'(saved) never exists in memory: it is made while A is packed.
struct Gemm {
  DType dtype;  // of every operand and output; accumulation is f32 (f64 for f64)
  int64_t m, n, k;
  View a;            // A[i, p], or the incoming gradient g in A's orientation when `saved` is set
  View saved;        // data == nullptr: A is plain
  View b;            // B[p, j]
  Activation act;    // of the epilogue (forward) or of dz (backward)
  const void* bias;  // [n] contiguous, or nullptr
  void* c;           // [m, n] contiguous
  Store store;       // of c; other than rounded: no activation, and by gemm only
  void* z;           // [m, n] contiguous pre-activation, or nullptr
  const void* gate;  // [m, n] contiguous: c is multiplied by gate_act'(gate), the layer below's mask; or nullptr
  Activation gate_act;
  void* row_sum;   // [m] row sums of A, or nullptr
  int splits;      // > 1: k is cut in this many slices, summed in order
  void* panels;    // scratch of panels_size() bytes, or nullptr: every task packs the B it needs
  void* partials;  // splits > 1: scratch of partials_size() accumulators, f32 (f64 for f64)
};

// dz and dbias as one elementwise pass, for gradients that need no product.
struct GradPass {
  DType dtype;
  int64_t m, n;
  View g;      // [m, n]
  View saved;  // [m, n]
  Activation act;
  void* dz;        // [m, n] contiguous, or nullptr
  void* dbias;     // [n], or nullptr
  Store store;     // of dbias
  void* partials;  // slices(m) * n accumulators, f32 (f64 for f64), when dbias is set
};

// A chain of narrow layers, h[l+1] = act(h[l] · weightᵀ + bias), run block of rows by block of rows: what one layer hands
// to the next is in cache, forward and backward.
struct ChainLayer {
  int64_t n, k;
  View weight;       // [n, k]
  const void* bias;  // [n] contiguous, or nullptr
  Activation act;
  void* h;        // act's output, [rows, n] contiguous: forward writes it where set, backward reads it
  void* z;        // its input, likewise, where act' reads that
  void* dweight;  // [n, k] contiguous, or nullptr
  void* dbias;    // [n] contiguous, or nullptr
};

struct Chain {
  int64_t rows;
  int layers;
  const ChainLayer* layer;
  View x;       // [rows, layer[0].k]
  View grad_y;  // backward: of y
  void* dx;     // backward: [rows, layer[0].k] contiguous, or nullptr
  // backward: the rows are cut in this many slices, whose gradients of the parameters are summed in order
  int slices;
  void* partials;  // slices * chain_parameters() accumulators, f32 (f64 for f64)
};

constexpr int kChainLayers = 16;
// Accumulators of one slice: per layer dweight and behind it dbias, in rows of whole registers of any instruction set.
DLK_HD int64_t chain_pitch(int64_t features) { return (features + 15) / 16 * 16; }
int64_t chain_parameters(const Chain&);

// Where packing weight would cost more than it saves.
constexpr int64_t kFewRowsForward = 32;
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewDz = 1 << 18;  // elements of dz that every thread then makes for itself: 1 MiB

struct ActPass {
  int64_t count;
  const void* z;
  Activation act;
  void* y;
};

struct PackedProduct {
  void (*gemm)(const Gemm&, const Parallel&);
  int64_t (*panels_size)(const Gemm&, int threads);
  // Whether packing leaves values as they are, so that the row sums of A are those of what came.
  bool exact;
};

// The entry points for one element type.
struct Engine {
  const char* ukernel;  // dtype, tile and ISA, as explain() prints it
  // y = act(z), elementwise over count contiguous elements; behind a library GEMM. z and y may be the same.
  void (*act_pass)(const ActPass&, const Parallel&);
  PackedProduct packed;
  // The three products for few rows, without packing. forward: x and weight contiguous along k; dgrad: weight too.
  void (*few_forward)(const Gemm&, const Parallel&);  // M <= kFewRowsForward
  void (*few_dgrad)(const Gemm&, const Parallel&);    // M <= kFewRows
  void (*few_wgrad)(const Gemm&, const Parallel&);    // M <= kFewRows
  void (*grad_pass)(const GradPass&, const Parallel&);
  // Layers of at most chain_features in and out features.
  int64_t chain_features;
  void (*chain_forward)(const Chain&, const Parallel&);
  void (*chain_backward)(const Chain&, const Parallel&);
  Losses losses;
};

// f32 tensors multiplied in bf16, where torch's settings allow it and the instruction set has such products.
struct InBf16 {
  const char* ukernel;  // nullptr: it has none
  PackedProduct packed;
};

// One instruction set's engines, indexed by DType.
struct Kernels {
  const char* isa;
  Engine engine[4];
  InBf16 f32_in_bf16;
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
