// Which path each product of a layer takes on CUDA, and why. The ops ask it before they run; explain() prints it.
// No torch, no device: what it needs to know comes in.
#pragma once

#include <string>

#include "kernels/params.h"

namespace dlk::cuda {

enum class Path : int32_t { simt, mma, hopper, cublas, fused_mlp };

struct RouteQuery {
  Op op;
  Shape shape;
  DType dtype;
  bool tf32;     // torch lets f32 products round their operands to TF32
  bool aligned;  // both operands can be read 16 bytes at a time (mma_takes_fast)
  bool in_rows;  // x, or dz, can be read row by row in more than elements (fused_mlp_takes_fast)
  int arch;      // compute capability, 90 for 9.0
  bool hopper;   // hopper_available() there, and hopper_takes() it
  bool chain;    // fused_mlp_takes() the layer there
};

struct Route {
  Path path;
  const char* why;
  bool hopper_off = false;  // Hopper's kernel takes the product too, but was never measured on it
};

Route route(const RouteQuery&);
std::string explained(const Route&);  // why, as explain() prints it

const char* name(Path path);
const char* kernel(Path path, DType dtype);  // as explain() prints it

}  // namespace dlk::cuda
