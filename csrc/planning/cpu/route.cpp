#include "planning/cpu/route.h"

#include <algorithm>
#include <cstdint>

namespace dlk::cpu {
namespace {

bool takes_few_rows(Op op, const Shape& shape, bool contiguous, int64_t most_rows) {
  const bool few = shape.m <= most_rows && (op == Op::forward || shape.m * shape.n <= kFewDz);
  return (contiguous || op == Op::wgrad) && few && shape.k >= 64 && shape.m > 0 && shape.n > 0;
}
// The products of this dtype run on tiles.
bool has_tiles(DType dtype, const Machine& machine) { return dtype == DType::bf16 && machine.runs("amx"); }

// Wider layers spend their time in products, and taller blocks of rows serve those better. Measured, forward + backward, the
// fused MLP against layer by layer: on AVX-512 BF16 f32 1.05 times as fast at 256 features, bf16 1.04 at 128 and 0.97 at 192; by
// tiles of AMX 1.2 at 256.
int64_t fused_mlp_limit(DType dtype, const Machine& machine) {
  return dtype == DType::bf16 && !has_tiles(dtype, machine) ? 128 : 256;
}

// The sizes of a chain that decide how it runs.
struct ChainSizes {
  int64_t m, parameters = 0, widest = 0, narrowest = INT64_MAX;
  int64_t block_rows;  // FusedMlpKernels::block_rows

  ChainSizes(const std::vector<Shape>& layers, int64_t block_rows) : m(layers[0].m), block_rows(block_rows) {
    for (const Shape& layer : layers) {
      widest = std::max({widest, layer.n, layer.k});
      narrowest = std::min({narrowest, layer.n, layer.k});
      parameters += layer.n * layer.k;
    }
  }
  // Of 2048 rows or more. A slice is worth its copy of the gradients; more slices than cores fill the cores evenly.
  int64_t slices_of_many_rows() const { return std::min({m / 1024, (int64_t{1} << 22) / parameters, int64_t{32}}); }
  bool has_many_rows() const { return slices_of_many_rows() >= 2; }
  // Of fewer rows a slice has 64 or more (by AMX 96), of wide layers 128; shorter ones cost more than they bring, as do many
  // copies of large gradients.
  int slices() const {
    if (has_many_rows()) return static_cast<int>(slices_of_many_rows());
    const int64_t by_rows = m / std::max<int64_t>(widest > 128 ? 128 : 64, block_rows);
    const int64_t by_memory = (1 << 19) / parameters;
    return static_cast<int>(std::clamp<int64_t>(std::min(by_rows, by_memory), 1, 4));
  }
};

// The least rows that are worth packing more than 64 KiB of weights for each thread: as many as the widest layer has features.
// AVX-512, which multiplies faster beside the same packing, needs twice as many in f32 and four times in f64. By tiles the layers
// pack nothing for few rows: forward, the fused MLP's speed over theirs was 0.97 and 1.24 (1 and 2 threads) at 128x256-256-256-256
// and 1.13 and 1.64 at 64x128-128-128-128, but 0.5 and 0.8 at fewer; backward 0.45 to 1.06 at up to 1024x256-256-256-256.
int64_t rows_worth_packing(Direction direction, const ChainSizes& chain, DType dtype, const Machine& machine) {
  if (has_tiles(dtype, machine)) return direction == Direction::forward ? chain.widest / 2 : INT64_MAX;
  if (machine.runs("avx2")) return chain.widest;
  return chain.widest * element_size(dtype) / 2;
}

// The reason why the fused MLP kernels do not pay for fewer than 2048 rows; nullptr: they pay. Measured with 1 and 2 threads from
// 1 to 1024 rows on Zen 3 and on a Xeon with AVX-512 and AMX (docs/internals/performance.md). With at most 64 KiB of parameters the
// fused MLP won for any number of rows. More threads than slices compute layer by layer, unless a slice takes less time than waking
// threads for each product.
const char* few_rows_do_not_pay(Direction direction, const ChainSizes& chain, DType dtype, const Machine& machine) {
  const bool tiles = has_tiles(dtype, machine);
  if ((is_16_bit(dtype) && !tiles) || machine.runs("portable"))
    return "fewer than 2048 rows: the fused MLP was not measured faster with these kernels";
  const int64_t element = machine.runs("avx2") ? 4 : element_size(dtype);  // Zen 3 had the same limits in f32 and f64
  if (chain.parameters * element > (1 << 16) && chain.m < rows_worth_packing(direction, chain, dtype, machine))
    return "few rows: packing all weights for each thread would cost more than it saves";
  // Forward cuts more than 32 rows in two blocks or more.
  const int parts = tiles && direction == Direction::forward ? std::max(chain.slices(), 2) : chain.slices();
  if (machine.threads > parts && chain.m * chain.parameters / parts > (tiles ? 1 << 23 : 1 << 20))
    return "fewer slices of rows than threads: layer by layer all of them work";
  return nullptr;
}

// The reason why the fused MLP kernels cannot take these layers; nullptr: they can.
const char* cannot_be_fused(const std::vector<Shape>& layers, const ChainSizes& chain, DType dtype,
                            const Machine& machine) {
  if (layers.size() > kFusedMlpLayers) return "more layers than the fused MLP kernels take";
  if (chain.m == 0 || chain.narrowest == 0) return "nothing to multiply";
  return chain.widest > machine.table(dtype).fused_mlp.features ? "wider layers than the fused MLP kernels take"
                                                                : nullptr;
}

// In f32 and f64 the dot products reload a row of x for each row of weight, and add up lanes at their end. The packed product
// overtakes them at 16 rows, and earlier where k is short; on AVX-512 behind 32 rows where weight has 1 MiB or more, which
// packing reads and writes once more. Measured on a Xeon with AVX-512 at 64→64 to 4096→4096, the packed product's time over
// theirs in f32: 1.08 to 1.3 at 24 rows of 512→512 to 2048→2048, 1.02 to 1.23 at 32 rows, but 0.94 to 1.01 at 32, 256→256. AVX2
// widens every row of weight again for two rows of x, by two instructions for bf16 and one for f16. Measured on Zen 3 at
// 1024→1024: f32 0.76 at 32 rows; bf16 1.29 at 8 rows, 0.97 at 12; f16 1.21 at 24.
int64_t few_rows_forward(const Shape& shape, DType dtype, const Machine& machine) {
  const bool avx2 = machine.runs("avx2");
  if (is_16_bit(dtype)) return avx2 ? (dtype == DType::bf16 ? 8 : 24) : kFewRowsForward;
  if (shape.k < 256) return shape.k / 16;
  const bool large = dtype == DType::f32 && shape.n * shape.k >= (int64_t{1} << 18);
  return large && !avx2 && !machine.runs("portable") ? kFewRowsForward : 16;
}

// For tiles every thread packs all of x: at most 8 MiB.
bool fits_tiles(Op op, const Shape& shape, const FewForward& tiles) {
  return !tiles.run || op != Op::forward || shape.m * shape.k <= (int64_t{1} << 22);
}
// Each 32 rows of weight are multiplied by all of x, which is read from L2 (2 MiB) if it fits in half of it.
bool tiles_read_l2(const Shape& shape) { return shape.m * shape.k <= (shape.m <= 256 ? int64_t{1} << 19 : 3 << 17); }
// The most rows for tiles. Behind 256 rows they pay where x is read from L2 and serves many rows of weight. Measured on a Xeon
// with AMX, the packed product's time over theirs: 1.10 to 1.55 at 300 to 512 rows of 512→512, 768→768, 1000→1000 and 768→3072;
// 0.84 at 384, 3072→768, 0.72 to 0.90 at 512, 1000→200, 0.77 to 0.89 at 1000, 512→512.
int64_t most_rows_of_tiles(const Shape& shape, const FewForward& tiles) {
  return tiles_read_l2(shape) && shape.n >= 256 ? tiles.most_rows : std::min<int64_t>(tiles.most_rows, 256);
}
constexpr Route kFewRowsRoute = {Path::few_rows, "few rows: packing weight would cost more than it saves"};

// Forward's dot products cost n · (k + lanes) per row, where lanes is the cost of adding up the lanes of one, in elements of k.
// Packed, a row costs packed · (k + 10) for any n up to 16. Fitted in f32. On AVX-512 few_columns had 0.84 of packed's speed at
// 1000x10x10, 1.3 times it at 4096x256x16, 1.9 at 16384x64x8, 3.8 at 20000x32x1; on AVX2 0.75 at 4096x32x16, 1.0 at
// 4096x512x16, 1.2 at 4096x128x12, 2.5 at 4096x32x2.
struct DotCost {
  int64_t lanes, packed;
};
constexpr DotCost kAvx512Dots = {48, 24}, kAvx2Dots = {32, 16};
// Where bf16 is multiplied in pairs, packed products are faster: forward had 1.2 times packed's speed at 12345x77x3 and 0.6 at
// 16384x64x8, forward + backward 1.0 at 4096x256x8 and 0.6 at 4096x256x16. In f32 backward won at every shape measured. Where
// AVX2 widens bf16, forward had 2.0 times packed's speed at 4096x512x4 and 0.8 at 4096x128x8, backward always won.
constexpr int64_t kWidenedForward = 4, kPairedForward = 4, kPairedBackward = 8;

int64_t most_columns(Op op, DType dtype, const Machine& machine) {
  if (dtype == DType::bf16 && machine.kernels->f32_in_bf16.ukernel)
    return op == Op::forward ? kPairedForward : kPairedBackward;
  return op == Op::forward && is_16_bit(dtype) && machine.runs("avx2") ? kWidenedForward : kFewColumns;
}

bool takes_few_columns(Op op, const Shape& shape, DType dtype, bool contiguous, const Machine& machine) {
  const auto [m, n, k] = shape;
  if (!contiguous || m == 0 || n == 0 || k == 0 || n > most_columns(op, dtype, machine)) return false;
  const DotCost cost = machine.runs("avx2") ? kAvx2Dots : kAvx512Dots;
  return op != Op::forward || n * (k + cost.lanes) <= cost.packed * (k + 10);
}

// The most rows for which dgrad adds up rows of weight where they lie, and wgrad writes outer products. Measured on a Xeon, the
// packed product's time over theirs, two threads, at 512→512, 512→2752 and 2048→1536: dgrad of 6 rows f32 0.91, 0.88 and 0.96, bf16
// by AMX 0.87, 0.88 and 0.85; of 4 rows 0.95, 0.92 and 1.11, and 1.02, 1.09 and 1.00; on AVX2 of 8 rows f32 1.08, 1.07 and 1.12,
// bf16 1.16 in all. wgrad of 8 rows 1.08, 1.12 and 1.16, and 0.93, 1.28 and 1.10; of 12 rows at 512→512, 512→1376 and 512→2752 f32
// 1.09, 1.49 and 1.07, bf16 0.82, 0.93 and 0.92.
int64_t few_rows_backward(Op op, DType dtype, const Machine& machine) {
  if (op == Op::wgrad) return is_16_bit(dtype) ? 8 : 12;
  return machine.runs_avx512() ? 4 : kFewRowsDgrad;
}

// The output has so few columns that packing the other operand costs about as much as multiplying it. In f32 MKL's code for
// Intel has the edge there. Measured on a Xeon with AVX-512 at random sizes with `bench.sweep`'s ranges, medians of one and of two
// threads. Forward over 17 to 63 features, torch's time over ours: k of 256 or more 0.83 and 0.84, of 128 to 255 0.95 and 0.89; 17
// to 127 rows 1.0, but with two threads 0.72 at 17 to 31 features. Backward over 2 to 63 in_features, stock's time over that of our
// products, of torch's, and of torch's dgrad with our wgrad: without an activation 0.87, 0.97, 0.93 and 1.02, 0.99, 1.06, where ours
// had 0.82 to 1.0 below 2^19 elements of dz; with ReLU, which packing applies on its way, 1.03, 0.99, 0.84 and 1.20, 1.06, 1.03.
// Over one in_feature, with ReLU or without, ours had 0.46 to 0.69, torch's 0.96 to 1.13.
bool is_narrow_for_packing(Op op, const Problem& p, const Machine& machine) {
  const auto [m, n, k] = p.shape;
  if (p.dtype != DType::f32 || machine.bf16_products || machine.maker != Maker::intel || !machine.runs_avx512())
    return false;
  if (op == Op::forward) return n < 64 && k >= 128 && (m >= 128 || (n < 32 && machine.threads > 1));
  const bool dz_is_given = p.act.kind == Act::none;
  if (k == 1) return true;
  return k < 64 && dz_is_given && (op == Op::dgrad || machine.threads == 1 || m * n < (int64_t{1} << 19));
}

Route autocast_route(Op op, const Shape& shape, bool contiguous, const Machine& machine) {
  const int64_t most_rows = op == Op::forward ? kFewRowsForward : few_rows_backward(op, DType::bf16, machine);
  if (takes_few_rows(op, shape, contiguous, most_rows)) return kFewRowsRoute;
  return {Path::packed, "our packed GEMM, which rounds float32 to bfloat16 while it packs"};
}

// Nobody has measured this kernel set beside torch on a processor of this maker, and nobody asked for it. In f32 and f64 torch's
// library, MKL, has other code for each maker's processors; in 16 bits torch's code depends on the instruction set alone.
bool is_unmeasured(DType dtype, const Machine& machine) {
  if (machine.forced != Forced::no || machine.isa_capped) return false;
  if (machine.runs("portable")) return true;
  const bool measured = machine.maker == Maker::amd || (machine.maker == Maker::intel && !machine.runs("avx2"));
  return !measured && !is_16_bit(dtype);
}

// The kernels can compute this product by this path, fast or not.
bool takes(Path path, Op op, const Shape& shape, DType dtype, bool contiguous, const Machine& machine) {
  const FewForward& tiles = machine.table(dtype).tiles_forward;
  switch (path) {
    case Path::packed:
    case Path::aten: return true;
    case Path::few_columns: return contiguous && shape.n <= kFewColumns;
    case Path::few_rows: {
      const int64_t forward = tiles.run ? tiles.most_rows : kFewRowsForward;
      return fits_tiles(op, shape, tiles) && takes_few_rows(op, shape, contiguous,
                                                            op == Op::forward ? forward
                                                            : op == Op::dgrad ? kFewRowsDgrad
                                                                              : kFewRowsWgrad);
    }
    default: return false;
  }
}

// The row that decides: not where f32 is multiplied in bf16, which no row was measured for.
const RouteRow* measured(Op op, const Shape& shape, DType dtype, bool contiguous, const Machine& machine) {
  if (!machine.routes || (dtype == DType::f32 && machine.bf16_products)) return nullptr;
  const RouteRow* row = machine.routes->find(op, dtype, shape, machine.threads);
  return row && takes(row->path, op, shape, dtype, contiguous, machine) ? row : nullptr;
}

const MlpRow* measured(Direction direction, const std::vector<Shape>& layers, DType dtype, const Machine& machine) {
  if (!machine.routes || (dtype == DType::f32 && machine.bf16_products)) return nullptr;
  return machine.routes->find_mlp(direction, dtype, layers, machine.threads);
}

}  // namespace

Route route(Op op, const Problem& problem, bool contiguous, const Machine& machine) {
  const auto& [shape, dtype, act, casts] = problem;
  if (casts != Casts::none) return autocast_route(op, shape, contiguous, machine);
  const bool empty = shape.m == 0 || shape.n == 0 || shape.k == 0;
  const bool free = machine.forced == Forced::no;
  if (machine.forced == Forced::aten && !empty) return {Path::aten, "DLKERNELS_CPU_GEMM=aten"};
  const bool unforced = free && !empty && !machine.isa_capped;
  if (unforced && dtype == DType::bf16 && machine.amx_refused)
    return {Path::aten, "our AMX micro-kernel failed its self-check on this CPU: torch's GEMM, our passes around it"};
  if (free && !empty)
    if (const RouteRow* row = measured(op, shape, dtype, contiguous, machine)) return {row->path, row->why.c_str()};
  if (unforced && dtype == DType::f16 && machine.amx_fp16)
    return {Path::aten,
            "this CPU has AMX-FP16 and dlkernels has no micro-kernel for it: torch's GEMM, our passes around it"};
  if (!empty && is_unmeasured(dtype, machine))
    return {Path::aten,
            "no measurement says that our kernels are faster on such a processor: torch's GEMM, our passes around it"};
  // Measured on AVX-512 BF16 with 128 rows and weights of 17 and 38 million elements: ours 0.76 to 0.95 of torch's speed.
  const bool large_weight = shape.m <= 256 && shape.n * shape.k >= (int64_t{1} << 23);
  if (free && dtype == DType::bf16 && large_weight && shape.m > kFewRowsForward && machine.runs("avx512_bf16"))
    return {Path::aten,
            "bf16, a large weight and few rows: torch's GEMM measured faster, our elementwise passes around it"};
  const KernelTable& table = machine.table(dtype);
  const bool tiles = table.tiles_forward.run && op == Op::forward;
  const int64_t most_of_tiles = tiles ? most_rows_of_tiles(shape, table.tiles_forward) : 0;
  // Measured on a Xeon with AMX, forward, against stock in place: ours 0.78 to 0.98, torch's GEMM and our pass 0.97 to 1.10, from
  // 192 rows and weights of a million elements on; below them ours 1.14 and more. So do tiles that read x from L2: torch's GEMM
  // takes 1.03 to 1.39 times as long at 192 and 256 rows of 1024→1024 to 2048→2048. k in whole tiles, or x would be copied.
  const bool library_is_faster = shape.m > 128 && !(shape.m <= most_of_tiles && tiles_read_l2(shape)) &&
                                 shape.n * shape.k >= (int64_t{1} << 20) && shape.k % 32 == 0;
  if (free && op == Op::forward && dtype == DType::bf16 && library_is_faster && machine.runs("amx"))
    return {Path::aten, "bf16 by AMX and a large weight: torch's GEMM measured faster, our elementwise pass behind it"};
  if (takes_few_columns(op, shape, dtype, contiguous, machine))
    return {Path::few_columns, "few columns: x is read where it lies, packing it would cost more than it saves"};
  const int64_t most_rows = op != Op::forward         ? few_rows_backward(op, dtype, machine)
                            : table.tiles_forward.run ? most_of_tiles
                                                      : few_rows_forward(shape, dtype, machine);
  if (fits_tiles(op, shape, table.tiles_forward) && takes_few_rows(op, shape, contiguous, most_rows))
    return kFewRowsRoute;
  if (unforced && is_narrow_for_packing(op, problem, machine))
    return {Path::aten, "a narrow output in float32: torch's GEMM measured faster, our elementwise passes around it"};
  return {Path::packed, "our packed GEMM with the fused epilogue"};
}

MlpRoute mlp_route(Direction direction, const std::vector<Shape>& layers, DType dtype, const Machine& machine) {
  if (machine.forced == Forced::aten) return {0, "DLKERNELS_CPU_GEMM=aten"};
  if (layers.size() < 2) return {0, "a chain of one layer"};
  const ChainSizes chain(layers, machine.table(dtype).fused_mlp.block_rows);
  if (const char* why = cannot_be_fused(layers, chain, dtype, machine)) return {0, why};
  if (machine.forced == Forced::no)
    if (const MlpRow* row = measured(direction, layers, dtype, machine))
      return {row->fused ? chain.slices() : 0, row->why.c_str()};
  if (is_unmeasured(dtype, machine)) return {0, "no measurement says that our kernels are faster on such a processor"};
  if (chain.widest > fused_mlp_limit(dtype, machine))
    return {0, "wide layers: taller blocks of rows serve their products better"};
  const char* const slow = chain.has_many_rows() ? nullptr : few_rows_do_not_pay(direction, chain, dtype, machine);
  if (slow && machine.forced == Forced::own) return {1, "DLKERNELS_CPU_GEMM=own"};
  if (slow) return {0, slow};
  return {chain.slices(), "narrow layers: a block of rows goes through all of them while it is in cache"};
}

bool members_in_parallel(int64_t members, const std::vector<Problem>& layers, const Machine& machine) {
  if (members < 2 || machine.threads == 1) return false;
  int64_t most = 0, total = 0;
  for (const Problem& layer : layers) {
    for (const Op op : {Op::forward, Op::dgrad, Op::wgrad})
      for (const bool contiguous : {true, false})
        if (is_library(route(op, layer, contiguous, machine).path)) return false;
    const int64_t multiplications = layer.shape.m * layer.shape.n * layer.shape.k;
    most = most < multiplications ? multiplications : most;
    total += multiplications;
  }
  const bool fills_threads = members >= machine.threads || machine.threads_for(most) == 1;
  return fills_threads && machine.threads_for(members * total) > 1;
}

}  // namespace dlk::cpu
