#include "planning/cpu/linear_cross_entropy.h"

#include "planning/cpu/route.h"

namespace dlk::cpu {
namespace {

// Rows per block: 2²² logits, 16 MiB in float32. But never fewer than 256 (16-bit products, which are faster: 512), for
// each block packs all of weight and passes over all of dweight: with 128 thousand classes a block has 128 MiB.
constexpr int64_t kBlockLogits = int64_t{1} << 22;

// One chain of 256 blocks (65536 rows of 16384 classes) errs three times as much as torch's product over all rows. In 16
// bits dweight is rounded more coarsely than that, so there one sum is enough.
constexpr int64_t kSumBlocks = 64;

}  // namespace

BlockPlan plan_linear_cross_entropy(const Shape& shape, DType dtype, const Machine& machine) {
  const auto [m, classes, k] = shape;
  const int64_t most = std::max<int64_t>(kBlockLogits / classes, is_16_bit(dtype) ? 512 : 256);
  BlockPlan plan{};
  plan.rows = std::min(m, equal_blocks(m, most, 16));
  plan.blocks = (m + plan.rows - 1) / plan.rows;
  // One answer for all three products of a block: its few rows have no path of their own. float16 gradients would leave
  // the range of a library's rounded product.
  const Problem block = {{plan.rows, classes, k}, dtype, {Act::none, 0}};
  plan.library = dtype != DType::f16 && is_library(route(Op::forward, block, false, machine).path);
  plan.dx = dtype == DType::f16 ? OutputMode::uncast : OutputMode::cast;
  plan.blocks_per_sum = is_16_bit(dtype) ? plan.blocks : kSumBlocks;
  return plan;
}

}  // namespace dlk::cpu
