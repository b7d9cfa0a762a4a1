#include "planning/cuda/linear_cross_entropy.h"

namespace dlk::cuda {
namespace {

// Rows of a block: 2²⁶ logits, 128 MiB in 16 bits, but never fewer than 2048. With R rows the product that makes dweight
// does 2·R·K operations for every class, and reads and writes 8·K bytes of accumulators: an H200, at 8e14 operations and
// 4.8e12 bytes a second, takes as long for both with R = 667. (Arithmetic: nothing was measured.)
constexpr int64_t kBlockLogits = int64_t{1} << 26, kFewestRows = 2048;

}  // namespace

BlockPlan plan_linear_cross_entropy(const Shape& shape, DType dtype, int64_t given) {
  const int64_t most = given ? given : std::max(kBlockLogits / std::max<int64_t>(shape.n, 1), kFewestRows);
  BlockPlan plan{};
  plan.rows = equal_blocks(shape.m, most, 1);
  plan.blocks = (shape.m + plan.rows - 1) / plan.rows;
  plan.dx = dtype == DType::f16 ? OutputMode::uncast : OutputMode::cast;
  plan.one_layer = plan.blocks == 1 && plan.dx == OutputMode::cast;
  plan.blocks_per_sum = plan.blocks;
  return plan;
}

}  // namespace dlk::cuda
