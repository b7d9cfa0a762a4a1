// Plain structs that describe one call to a kernel: pointers, sizes, strides. No torch, no CUDA.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DLK_HD __host__ __device__ __forceinline__
#else
#define DLK_HD inline __attribute__((always_inline))
#endif

namespace dlk {

enum class DType : int32_t { f64, f32, bf16, f16 };

DLK_HD bool is_16_bit(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }
// In bytes. Accumulators are f32, or f64 for f64.
DLK_HD int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
DLK_HD int64_t accumulator_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// The order is the wire format of the op schemas: dlkernels/_ops/activations.py lists the same names.
enum class Act : int32_t { none, relu, leaky_relu, relu2, gelu, gelu_tanh, silu, tanh, sigmoid };

// One of a layer's three products.
enum class Op : int32_t { forward, dgrad, wgrad };

// y[m, n] = act(x[m, k] · weight[n, k]ᵀ + bias[n])
struct Shape {
  int64_t m, n, k;
};

// A 2-D view of memory; strides in elements, 0 and negative allowed.
struct View {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;

  DLK_HD View transposed() const { return {data, col_stride, row_stride}; }
};

// An activation and the one parameter any of them has (leaky_relu's negative slope).
struct Activation {
  Act kind;
  double slope;
};

// A mask keeps one bit per element of y, for activations whose gradient needs_sign_only (activation.h): bit j % 8 of byte
// i * n / 8 + j / 8 belongs to y[i, j]. Only on CUDA, in 16-bit dtypes, where n is a multiple of 8.
constexpr int kMaskBits = 8;

// How a product is stored: cast to its dtype, uncast as accumulators (f32, f64 for f64), or accumulated into such.
enum class OutputMode : int32_t { cast, uncast, accumulate };

// The three products of one layer are one problem: C[m, n] = A[m, k] · B[k, n].
//
//            A                      B              C
//   forward  x  [M, K]              weightᵀ [K, N]  y  [M, N]   epilogue: bias, activation
//   dgrad    dz [M, N]              weight [N, K]   dx [M, K]
//   wgrad    dzᵀ [N, M]             x [M, K]        dw [N, K]   row sums of A: dbias [N]
//
// dz = g · act'(saved) is made while A is packed or loaded. Only where a library multiplies, or dbias is needed alone, a
// pass (GradPass) writes dz to memory.
struct Gemm {
  DType dtype;  // of every operand and output; accumulation is f32 (f64 for f64)
  int64_t m, n, k;
  View a;                  // A[i, p], or the incoming gradient g in A's orientation when `saved` is set
  View saved;              // data == nullptr: A is plain
  View b;                  // B[p, j]
  Activation act;          // of the epilogue (forward) or of dz (backward)
  const void* bias;        // [n] contiguous, or nullptr
  void* c;                 // [m, n] contiguous
  OutputMode output_mode;  // of c; other than cast: on CPU no activation, and by gemm only; on CUDA no mask
  void* z;                 // [m, n] contiguous pre-activation, or nullptr
  const void*
      below_saved;  // [m, n] contiguous: c is multiplied by below_act'(below_saved), the layer below's mask; or nullptr
  Activation below_act;
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
  void* dz;                // [m, n] contiguous, or nullptr
  void* dbias;             // [n], or nullptr
  OutputMode output_mode;  // of dbias; not accumulate
  void* partials;          // slices(m) * n accumulators of the twin that runs it, f32 (f64 for f64), when dbias is set
};

// y = act(z), elementwise over count contiguous elements; behind a library's GEMM. z and y may be the same.
struct ActPass {
  int64_t count;
  const void* z;
  Activation act;
  void* y;
};

// A fused MLP: narrow layers, h[l+1] = act(h[l] · weightᵀ + bias), run block of rows by block of rows: the output of one
// layer is in cache when the next layer reads it, forward and backward.
struct FusedMlpLayer {
  int64_t n, k;
  View weight;       // [n, k]
  const void* bias;  // [n] contiguous, or nullptr
  Activation act;
  void* h;        // act's output, [rows, n] contiguous: forward writes it where set, backward reads it
  void* z;        // its input, likewise, where act' reads that
  void* dweight;  // [n, k] contiguous, or nullptr
  void* dbias;    // [n] contiguous, or nullptr
  void* mask;     // on CUDA: of h, likewise; backward reads it in place of h; or nullptr
};

struct FusedMlp {
  int64_t rows;
  int layers;
  const FusedMlpLayer* layer;
  View x;       // [rows, layer[0].k]
  View grad_y;  // backward: of y
  void* dx;     // backward: [rows, layer[0].k] contiguous, or nullptr
  // backward: the rows are cut in this many slices, whose gradients of the parameters are summed in order
  int slices;
  void*
      partials;  // slices * fused_mlp_parameters() accumulators, f32 (f64 for f64); on CUDA fused_mlp_partials() of them
};

}  // namespace dlk
