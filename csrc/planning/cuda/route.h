// Which path each product of a layer takes on CUDA, and why. A pure function: all it needs to know comes in.
#pragma once

#include <string>
#include <vector>

#include "kernels/params.h"
#include "planning/routes.h"

namespace dlk::cuda {

struct RouteQuery {
  Op op;
  Shape shape;
  DType dtype;
  bool tf32;                           // torch lets f32 products round their operands to TF32
  bool aligned;                        // both operands can be read 16 bytes at a time (mma_takes_fast)
  bool in_rows;                        // x, or dz, can be read row by row in more than elements (fused_mlp_takes_fast)
  int arch;                            // compute capability, 90 for 9.0
  bool hopper;                         // hopper_available() there, and hopper_takes() it
  bool narrow;                         // fused_mlp_takes() the layer there
  const Path* forced = nullptr;        // the path to take wherever it can be; null: the table decides
  const RouteTable* routes = nullptr;  // the table in use; null: none
};

// The path that DLKERNELS_CUDA_GEMM names, for tests and to measure; null where it is not set. Throws std::runtime_error
// for other values.
const Path* forced_path();

Route route(const RouteQuery&);
// The route's reason as explain() prints it: it names Hopper's kernel where that is off because it was not measured.
std::string explained(const Route&, const RouteQuery&);

struct MlpQuery {
  Direction direction;
  const std::vector<Shape>& layers;
  DType dtype;
  bool tf32;
  int arch;
  int slices;                          // in which the kernels cut the rows of backward; 0: they do not take the layers
  const Path* forced = nullptr;        // the tables are asked without one
  const RouteTable* routes = nullptr;  // the table in use; null: none
};

MlpRoute mlp_route(const MlpQuery&);

const char* kernel(Path path);  // as explain() prints it

}  // namespace dlk::cuda
