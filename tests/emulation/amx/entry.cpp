// The AMX products, the choice of the kernel set and the tile instructions with C signatures, for ctypes.
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../../kernels/threads/in_threads.h"
#include "kernels/cpu/isa/isa.h"
#include "planning/cpu/route.h"

namespace dlk::cpu {

// The other kernel sets are not tested here. A name is enough for them to be chosen.
extern const Kernels k_portable, k_avx2, k_avx512, k_avx512_bf16;
const Kernels k_portable = {"portable", {}}, k_avx2 = {"avx2", {}}, k_avx512 = {"avx512", {}},
              k_avx512_bf16 = {"avx512_bf16", {}};

extern const PackedProduct k_amx_bf16, k_amx_f32_in_bf16;
extern const FewForward k_amx_few_forward;
extern const FusedMlpKernels k_amx_fused_mlp;
extern const PackedLayer k_amx_autocast_f32_x, k_amx_autocast_bf16_x;

// Return the product for these element types of A, B and C; nullptr: no layer has such a product.
const PackedProduct* product(DType a, DType b, DType c) {
  const struct {
    DType a, b, c;
    const PackedProduct* product;
  } products[] = {
      {DType::bf16, DType::bf16, DType::bf16, &k_amx_bf16},
      {DType::f32, DType::f32, DType::f32, &k_amx_f32_in_bf16},
      {DType::f32, DType::f32, DType::bf16, &k_amx_autocast_f32_x.forward},
      {DType::bf16, DType::f32, DType::bf16, &k_amx_autocast_bf16_x.forward},
      {DType::bf16, DType::f32, DType::f32, &k_amx_autocast_f32_x.dgrad},
      {DType::bf16, DType::bf16, DType::f32, &k_amx_autocast_bf16_x.wgrad},
  };
  for (const auto& known : products)
    if (known.a == a && known.b == b && known.c == c) return known.product;
  return nullptr;
}

}  // namespace dlk::cpu

using namespace dlk;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Run a product. With all types f32, the tensors are multiplied in bf16. Return the palette that is left configured: 0.
EXPORT int gemm(int a_dtype, int b_dtype, int c_dtype, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row,
                int64_t a_col, const void* saved, int64_t saved_row, int64_t saved_col, const void* b, int64_t b_row,
                int64_t b_col, int act, double slope, const void* bias, void* c, void* z, void* row_sum, int splits,
                void* partials, int threads) {
  Gemm p{};
  p.dtype = static_cast<DType>(c_dtype);
  p.m = m, p.n = n, p.k = k;
  p.a = {a, a_row, a_col};
  p.saved = {saved, saved_row, saved_col};
  p.b = {b, b_row, b_col};
  p.act = {static_cast<Act>(act), slope};
  p.bias = bias, p.c = c, p.z = z, p.row_sum = row_sum;
  p.splits = splits, p.partials = partials;
  threads_in_use = threads;
  const cpu::Parallel parallel = {threads, &in_threads};
  const cpu::PackedProduct* product =
      cpu::product(static_cast<DType>(a_dtype), static_cast<DType>(b_dtype), static_cast<DType>(c_dtype));
  if (!product) return -1;
  const int64_t panels = product->panels_size(p, threads);
  const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, (panels + 63) / 64 * 64), &std::free);
  p.panels = panels ? memory.get() : nullptr;
  product->gemm(p, parallel);
  return amx_emulation::config.palette;  // 0: no tile is left configured
}

// Run the forward of a gated layer, all in bf16 and contiguous. Returns the palette, like gemm.
EXPORT int gated(int64_t m, int64_t n, int64_t k, const void* x, const void* gate, const void* up, int act,
                 double slope, const void* bias_gate, const void* bias_up, void* y, void* z_gate, void* z_up,
                 int threads) {
  Gemm p{};
  p.dtype = DType::bf16;
  p.m = m, p.n = n, p.k = k;
  p.a = {x, k, 1};
  p.b = {gate, 1, k}, p.b_up = {up, 1, k};
  p.gated = true;
  p.act = {static_cast<Act>(act), slope};
  p.bias = bias_gate, p.bias_up = bias_up;
  p.c = y, p.z = z_gate, p.z_up = z_up, p.z_pitch = p.n;
  p.splits = 1;
  threads_in_use = threads;
  const int64_t panels = cpu::k_amx_bf16.panels_size(p, threads);
  const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, (panels + 63) / 64 * 64), &std::free);
  p.panels = panels ? memory.get() : nullptr;
  cpu::k_amx_bf16.gemm(p, {threads, &in_threads});
  return amx_emulation::config.palette;
}

// Run the forward for few rows, all in bf16; x and weight are contiguous along k. Returns the palette, like gemm.
EXPORT int few_rows(int64_t m, int64_t n, int64_t k, const void* x, int64_t x_row, const void* weight,
                    int64_t weight_row, int act, double slope, const void* bias, void* y, void* z, int threads) {
  Gemm p{};
  p.dtype = DType::bf16;
  p.m = m, p.n = n, p.k = k;
  p.a = {x, x_row, 1};
  p.b = {weight, 1, weight_row};
  p.act = {static_cast<Act>(act), slope};
  p.bias = bias, p.c = y, p.z = z;
  threads_in_use = threads;
  cpu::k_amx_few_forward.run(p, {threads, &in_threads});
  return amx_emulation::config.palette;
}

// Run the fused MLP forward and backward, all in bf16 and contiguous. sizes: in_features, then out_features of each layer. For
// each layer `memory` has weight, bias, h, z, dweight and dbias. Returns the palette, like gemm.
EXPORT int fused_mlp(int64_t rows, int layers, const int64_t* sizes, const void* x, void* const* memory, int act,
                     double slope, const void* grad_y, void* dx, int slices, int threads) {
  std::vector<FusedMlpLayer> chain(layers);
  for (int l = 0; l < layers; ++l, memory += 6) {
    FusedMlpLayer& layer = chain[l];
    layer.k = sizes[l], layer.n = sizes[l + 1];
    layer.weight = {memory[0], layer.k, 1};
    layer.bias = memory[1], layer.h = memory[2], layer.z = memory[3];
    layer.dweight = memory[4], layer.dbias = memory[5];
    layer.act = {static_cast<Act>(act), slope};
  }
  FusedMlp p{};
  p.rows = rows, p.layers = layers, p.layer = chain.data();
  p.x = {x, sizes[0], 1}, p.grad_y = {grad_y, sizes[layers], 1}, p.dx = dx;
  p.slices = slices;
  std::vector<float> partials(slices * cpu::fused_mlp_parameters(p));
  p.partials = partials.data();
  threads_in_use = threads;
  cpu::k_amx_fused_mlp.forward(p, {threads, &in_threads});
  cpu::k_amx_fused_mlp.backward(p, {threads, &in_threads});
  return amx_emulation::config.palette;
}

EXPORT int gemm_splits(int64_t m, int64_t n, int64_t k) { return cpu::gemm_splits(m, n, k); }

// Describe what a process on this processor runs: the kernel set, and the path of a bf16 forward with its reason.
EXPORT const char* chosen(int dtype) {
  static std::string said;
  try {
    const Problem problem = {{700, 500, 500}, static_cast<DType>(dtype), {Act::none, 0}};
    const Route route = cpu::route(Op::forward, problem, true, cpu::this_machine(1, false));
    said = std::string(cpu::kernels().isa) + " | " + name(route.path) + " | " + route.why;
  } catch (const std::exception& e) {
    said = e.what();
  }
  return said.c_str();
}

EXPORT void tile_loadconfig(const void* config) { _tile_loadconfig(config); }
EXPORT void tile_release() { _tile_release(); }
EXPORT void tile_zero(int tile) { _tile_zero(tile); }
EXPORT void tile_loadd(int tile, const void* base, int64_t stride) { _tile_loadd(tile, base, stride); }
EXPORT void tile_stored(int tile, void* base, int64_t stride) { _tile_stored(tile, base, stride); }
EXPORT void tile_dpbf16ps(int c, int a, int b) { _tile_dpbf16ps(c, a, b); }
