// Which path each product of a layer takes on CPU, and why. The ops ask it before they run; explain() prints it.
#pragma once

#include "../params.h"
#include "kernels.h"

namespace dlk::cpu {

enum class Op { forward, dgrad, wgrad };
enum class Path { packed, few_rows, aten };

struct Route {
  Path path;
  const char* why;
};

// `contiguous`: weight, and in forward x too, has its last stride 1, which few_rows needs.
Route route(Op op, const Shape& shape, DType dtype, bool contiguous);

const char* name(Path path);

}  // namespace dlk::cpu
