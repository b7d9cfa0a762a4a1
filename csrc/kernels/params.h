// Plain structs that describe one call to a kernel: pointers, sizes, strides. No torch, no CUDA.
//
// csrc/planning fills in what follows from shapes and strides, csrc/ops fills in the memory, and the kernels of cpu/
// and cuda/ read it. A shape in brackets is in elements. "or nullptr" means that the caller may leave the pointer out.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DLK_HD __host__ __device__ __forceinline__
#else
#define DLK_HD inline __attribute__((always_inline))
#endif

namespace dlk {

// The element type of a tensor.
enum class DType : int32_t { f64, f32, bf16, f16 };

// A 16-bit type: widened to f32 for arithmetic, and rounded when it is stored.
constexpr bool is_16_bit(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }
// In bytes. Accumulators are f32, or f64 for f64.
constexpr int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
constexpr int64_t accumulator_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// The name of an activation; activation.h has the formulas. The order is the wire format of the op schemas:
// dlkernels/_ops/activations.py lists the same names.
enum class Act : int32_t { none, relu, leaky_relu, relu2, gelu, gelu_tanh, silu, tanh, sigmoid };

// One of a layer's three products.
enum class Op : int32_t { forward, dgrad, wgrad };

// The sizes of a layer, y[m, n] = act(x[m, k] · weight[n, k]ᵀ + bias[n]): m rows, n out_features, k in_features.
struct Shape {
  int64_t m, n, k;
};

// A 2-D view of memory. Strides are in elements; 0 and negative strides are allowed.
struct View {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;

  DLK_HD View transposed() const { return {data, col_stride, row_stride}; }
};

// The view of a contiguous [rows, cols] tensor. Without data it says where such a tensor would lie.
DLK_HD View contiguous_view(int64_t cols, const void* data = nullptr) { return {data, cols, 1}; }

// An activation and its parameter. leaky_relu alone has one, its negative slope.
struct Activation {
  Act kind;
  double slope;
};

// An activation mask keeps one bit per element of y, for activations whose gradient needs_sign_only (activation.h): bit
// j % 8 of byte i * n / 8 + j / 8 belongs to y[i, j]. Masks exist on CUDA, in 16-bit dtypes, where n is a multiple of
// 8.
constexpr int kMaskBits = 8;

// How a sum is stored: rounded to the dtype of the call, unrounded as an accumulator (f32, f64 for f64), or added to
// the accumulator in memory.
enum class OutputMode : int32_t { cast, uncast, accumulate };

// One product and its epilogue. The three products of a layer are one problem, C[m, n] = A[m, k] · B[k, n]:
//
//            A                      B              C
//   forward  x  [M, K]              weightᵀ [K, N]  y  [M, N]   epilogue: bias, activation
//   dgrad    dz [M, N]              weight [N, K]   dx [M, K]
//   wgrad    dzᵀ [N, M]             x [M, K]        dw [N, K]   row sums of A: dbias [N]
//
// dz = g · act'(saved) is made while A is loaded or packed. It lies in memory only where a pass (GradPass) wrote it
// before: in front of a library's product, and on CUDA also where two kernels read it or where the kernel cannot make
// it. A is plain then, and `saved` is not set.
struct Gemm {
  DType dtype;  // of every operand and output; accumulators are f32 (f64 for f64)
  int64_t m, n, k;
  View a;                   // A[i, p]; with `saved` it is g, in A's orientation
  View saved;               // what act' reads, in A's orientation; data == nullptr: A is plain
  View b;                   // B[p, j]
  Activation act;           // forward: of the epilogue; backward: of dz
  const void* bias;         // [n] contiguous, or nullptr
  void* c;                  // [m, n] contiguous
  OutputMode output_mode;   // of c. Other than cast: on CPU no activation, and gemm alone; on CUDA no mask
  void* z;                  // [m, n] contiguous: receives the preactivation; or nullptr
  const void* below_saved;  // [m, n] contiguous: c = sum · below_act'(below_saved); or nullptr
  Activation below_act;     // of the layer below, which made x and saved below_saved
  void* row_sum;            // [m]: receives the row sums of A, which are dbias in wgrad; or nullptr
  int splits;               // k-slices; > 1: the slices are summed in order
  void* panels;             // CPU: scratch of panels_size() bytes, or nullptr: every task packs the B that it needs
  void* partials;           // splits > 1: scratch of partials_size() accumulators

  // Forward of a gated layer, CPU: c = act(A · B + bias) · (A · b_up + bias_up). z receives the first preactivation.
  bool gated;           // there is a second product
  View b_up;            // B[p, j] of it
  const void* bias_up;  // [n] contiguous, or nullptr
  void* z_up;           // [m, n]: receives the second preactivation; set where z is
  int64_t z_pitch;      // of z and z_up: elements from row to row
};

// dz = g · act'(saved) and dbias = the column sums of dz, as one elementwise pass. For library products, which read dz
// from memory, and for a dbias that no product adds up on its way.
struct GradPass {
  DType dtype;
  int64_t m, n;
  View g;      // [m, n], the gradient of y
  View saved;  // [m, n], what act' reads
  Activation act;
  void* dz;                // [m, n] contiguous, or nullptr
  void* dbias;             // [n], or nullptr
  OutputMode output_mode;  // of dbias; not accumulate
  void* partials;          // with dbias: accumulators. CPU: slices(m) * n of them; CUDA: grad_pass_partials()
};

// y = act(z), elementwise over count contiguous elements, behind a library's product. z and y may be the same memory.
struct ActPass {
  int64_t count;
  const void* z;
  Activation act;
  void* y;
};

// out = t · the derivative of this order of act at s, elementwise over count contiguous elements. s is z, or y where act' reads
// that (activation.h). order is from 1 to derivative_orders(act). A second derivative of a network reads order 2, its backward
// order 3. CPU.
struct DerivativePass {
  int64_t count;
  const void *t, *s;
  Act act;
  int order;
  void* out;
};

// y = act(z + bias), [m, n] contiguous, behind a library's product without a bias. The memory of y, or of z_sum, may be
// that of z. CPU.
struct BiasActPass {
  int64_t m, n;
  const void *z, *bias;  // bias: [n]
  Activation act;
  void* y;
  void* z_sum;  // receives z + bias, or nullptr
};

// y = act(gate) · up, [m, n], behind the products of a gated layer. y is contiguous. It may be the memory of either operand if
// those are.
struct GluPass {
  int64_t m, n;
  const void *gate, *up;  // the preactivations
  int64_t pitch;          // of gate and up: elements from row to row
  Activation act;
  void* y;
};

// The gradients of both preactivations of a gated layer, and their column sums, in one elementwise pass:
//
//   dz_gate = g · up · act'(gate)    dbias_gate = Σ dz_gate
//   dz_up   = g · act(gate)          dbias_up   = Σ dz_up
struct GluGradPass {
  DType dtype;
  int64_t m, n;
  View g;         // [m, n], the gradient of y
  View gate, up;  // [m, n], the preactivations. up may have no data where nothing of the gate is wanted; gate where
                  // nothing of up is wanted and the activation is none
  Activation act;
  void *dz_gate, *dz_up;        // [m, n], rows dz_pitch elements apart; either may be nullptr
  int64_t dz_pitch;             //
  void *dbias_gate, *dbias_up;  // [n], or nullptr
  void* partials;               // accumulators, for each dbias as many as in GradPass
};

// The most layers of one fused MLP.
constexpr int kFusedMlpLayers = 16;

// One layer of a fused MLP, and what it exchanges with memory.
struct FusedMlpLayer {
  int64_t n, k;
  View weight;       // [n, k]
  const void* bias;  // [n] contiguous, or nullptr
  Activation act;
  void* h;        // [rows, n] contiguous, the layer's output: forward writes it, backward reads it; or nullptr
  void* z;        // [rows, n] contiguous, its preactivation, where act' reads that: likewise
  void* dweight;  // [n, k] contiguous, or nullptr
  void* dbias;    // [n] contiguous, or nullptr
  void* mask;     // CUDA: the activation mask of h, which backward reads in place of h; or nullptr
};

// A fused MLP: several narrow layers, h[l + 1] = act(h[l] · weightᵀ + bias), as one kernel. A block of rows goes
// through all layers, so that the output of one layer is in cache when the next layer reads it, in forward and in
// backward.
struct FusedMlp {
  int64_t rows;
  int layers;  // at most kFusedMlpLayers
  const FusedMlpLayer* layer;
  View x;          // [rows, layer[0].k]
  View grad_y;     // backward: [rows, n of the last layer], the gradient of y
  void* dx;        // backward: [rows, layer[0].k] contiguous, or nullptr
  int slices;      // backward: of the rows. The parameter gradients of the slices are summed in order
  void* partials;  // backward: accumulators. CPU: slices * fused_mlp_parameters(); CUDA: fused_mlp_partials()
};

}  // namespace dlk
