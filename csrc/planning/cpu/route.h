// Which path each product of a layer takes on CPU, and why. The ops ask it before they run; explain() prints it.
#pragma once

#include <vector>

#include "kernels/params.h"
#include "kernels/cpu/kernels.h"

namespace dlk::cpu {

enum class Path { packed, few_rows, few_columns, aten };

struct Route {
  Path path;
  const char* why;
};

// `contiguous`: what the product reads of weight and x has its last stride 1, which few_columns needs, and few_rows but in
// wgrad.
Route route(Op op, const Shape& shape, DType dtype, bool contiguous);

// Whether layers under autocast have kernels of their own here (autocast.h): the same for all of them in a process.
bool autocast_kernels();
// The path of a product of theirs.
Route autocast_route(Op op, const Shape& shape, bool contiguous);

// In how many slices of rows the chain kernels take these layers, a function of the shapes alone; 0: layer by layer.
int fused_mlp_slices(const std::vector<Shape>& layers, DType dtype);

const char* name(Path path);

}  // namespace dlk::cpu
