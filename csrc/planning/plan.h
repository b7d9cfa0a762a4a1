// A plan says what runs for one layer, before anything runs: a short list of steps. Planning makes it from a problem and
// a machine, csrc/ops runs it, explain() prints it.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace dlk {

// The kernel of a step; elementwise is a pass. aten and cublas are torch's own products, on CPU and on CUDA.
enum class Path : int32_t { packed, few_rows, few_columns, aten, simt, mma, hopper, cublas, fused_mlp, elementwise };

constexpr bool is_library(Path path) { return path == Path::aten || path == Path::cublas; }
const char* name(Path);

// Which path a product takes, and why.
struct Route {
  Path path;
  const char* why;
};

// How a chain of layers runs in one direction: in how many slices of rows the fused MLP kernels take it, or layer by layer.
enum class Direction : int32_t { forward, backward };
struct MlpRoute {
  int slices;  // 0: layer by layer
  const char* why;
};

enum class StepKind : int32_t {
  forward,          // the product x · weightᵀ; a kernel of ours ends it with bias and activation
  dgrad,            // the product dz · weight
  wgrad,            // the product dzᵀ · x
  backward,         // dx, dweight and dbias of a small layer, from one read of grad_y and x
  activation_pass,  // y, and its mask, from the pre-activation; elementwise
  gradient_pass,    // dz and dbias from grad_y and what forward saved; elementwise
};
const char* name(StepKind);

// The tensors that a step writes, as bits.
enum Output : unsigned {
  kY = 1,
  kZ = 2,
  kMask = 4,
  kDz = 8,
  kDx = 16,
  kDweight = 32,
  kDbias = 64,
  kDbiasBelow = 128,  // dbias of the layer below
  // Of the second half of a gated layer; its first half has the names above.
  kZUp = 256,
  kDzUp = 512,
  kDweightUp = 1024,
  kDbiasUp = 2048,
};

constexpr const char* kElementwise = "elementwise";  // the reason of a pass

struct Step {
  StepKind kind;
  Path path;
  unsigned outputs;  // a sum of Output
  const char* why;   // of the path
  bool dz_in_load;   // makes dz while it loads grad_y and what forward saved; otherwise it reads dz
  bool below;        // multiplies dx by act' of the layer below, in its epilogue
  int splits;        // slices that the sum is cut in
};

struct Plan {
  static constexpr int kMostSteps = 4;
  Step steps[kMostSteps];
  int count = 0;

  void add(const Step& step) { steps[count++] = step; }
  const Step* begin() const { return steps; }
  const Step* end() const { return steps + count; }
};

}  // namespace dlk
