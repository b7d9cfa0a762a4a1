// Runs every threaded path of the portable kernels on std::threads, for ThreadSanitizer. torch uses OpenMP, whose
// runtime is not instrumented and would be reported. Exits with 1 if several threads give other bits than one.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/isa/isa.h"
#include "in_threads.h"

namespace dlk::cpu {

extern const Kernels k_portable, k_avx2, k_avx512, k_avx512_bf16;
const Kernels k_avx2 = {"avx2", {}}, k_avx512 = {"avx512", {}}, k_avx512_bf16 = {"avx512_bf16", {}};
extern const PackedProduct k_amx_bf16, k_amx_f32_in_bf16;
const PackedProduct k_amx_bf16{}, k_amx_f32_in_bf16{};
extern const FewForward k_amx_few_forward;
const FewForward k_amx_few_forward{};
extern const FusedMlpKernels k_amx_fused_mlp;
const FusedMlpKernels k_amx_fused_mlp{};
extern const PackedLayer k_amx_autocast_f32_x, k_amx_autocast_bf16_x;
const PackedLayer k_amx_autocast_f32_x{}, k_amx_autocast_bf16_x{};
extern int64_t (*const k_amx_peak_loop)(int64_t);
int64_t (*const k_amx_peak_loop)(int64_t) = nullptr;

}  // namespace dlk::cpu

using namespace dlk;
using namespace dlk::cpu;

namespace {

std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

using Results = std::vector<std::vector<float>>;

// Run one kernel with several numbers of threads, and return whether the results have the same bits. run(results,
// parallel) fills the results, which have `sizes` elements.
template <class F>
bool same_on_any_number_of_threads(const char* name, const std::vector<int64_t>& sizes, F run) {
  Results first;
  for (const int threads : {1, 2, 3, 7, 40}) {
    Results results;
    for (const int64_t size : sizes) results.emplace_back(size);
    threads_in_use = threads;
    run(results, Parallel{threads, &in_threads});
    if (threads == 1) {
      first = results;
    } else if (results != first) {
      std::printf("%s: %d threads give other bits than one\n", name, threads);
      return false;
    }
  }
  std::printf("%s\n", name);
  return true;
}

}  // namespace

int main() {
  const KernelTable& table = k_portable.table[static_cast<int>(DType::f32)];
  constexpr int64_t m = 700, n = 90, k = 333;
  const auto x = normal(m * k, 1), w = normal(n * k, 2), b = normal(n, 3), g = normal(m * n, 4), y = normal(m * n, 5);
  const Activation relu = {Act::relu, 0};
  bool good = true;

  auto product = [&](const char* name, Gemm p, bool sums, int splits, void (*kernel)(const Gemm&, const Parallel&)) {
    good &= same_on_any_number_of_threads(name, {p.m * p.n, p.m}, [&](Results& r, const Parallel& parallel) {
      p.dtype = DType::f32;
      p.c = r[0].data();
      p.row_sum = sums ? r[1].data() : nullptr;
      p.splits = splits;
      std::vector<float> partials(partials_size(p));
      p.partials = partials.data();
      std::vector<char> panels(table.packed.panels_size(p, parallel.threads) + 64);
      const auto at = reinterpret_cast<uintptr_t>(panels.data());
      p.panels = panels.size() > 64 ? reinterpret_cast<void*>((at + 63) / 64 * 64) : nullptr;
      kernel(p, parallel);
    });
  };
  Gemm forward{};
  forward.m = m, forward.n = n, forward.k = k;
  forward.a = {x.data(), k, 1}, forward.b = {w.data(), 1, k};
  forward.act = relu, forward.bias = b.data();
  product("forward", forward, false, 1, table.packed.gemm);
  Gemm dgrad{};
  dgrad.m = m, dgrad.n = k, dgrad.k = n;
  dgrad.a = {g.data(), n, 1}, dgrad.saved = {y.data(), n, 1}, dgrad.b = {w.data(), k, 1};
  dgrad.act = relu;
  product("dgrad", dgrad, false, 1, table.packed.gemm);
  dgrad.below_saved = x.data(), dgrad.below_act = relu;
  product("dgrad with the mask of the layer below", dgrad, false, 1, table.packed.gemm);
  Gemm wgrad{};
  wgrad.m = n, wgrad.n = k, wgrad.k = m;
  wgrad.a = {g.data(), 1, n}, wgrad.saved = {y.data(), 1, n}, wgrad.b = {x.data(), k, 1};
  wgrad.act = relu;
  product("wgrad and dbias", wgrad, true, 1, table.packed.gemm);
  product("wgrad and dbias in slices", wgrad, true, 3, table.packed.gemm);

  std::vector<float> z(m * n), z_up(m * n);
  Gemm gated = forward;
  gated.gated = true, gated.b_up = {y.data(), 1, k};
  gated.bias_up = g.data(), gated.act = {Act::silu, 0}, gated.z = z.data(), gated.z_up = z_up.data(), gated.z_pitch = n;
  product("gated forward", gated, false, 1, table.packed.gemm);

  forward.m = 20, dgrad.m = 8, wgrad.k = 8;
  dgrad.below_saved = nullptr;
  product("few rows, forward", forward, false, 1, table.few_forward.run);
  product("few rows, dgrad", dgrad, false, 1, table.few_dgrad);
  product("few rows, wgrad", wgrad, true, 1, table.few_wgrad);

  Gemm columns{};
  columns.m = 5 * m, columns.n = 11, columns.k = 60;
  columns.a = {x.data(), 60, 1}, columns.b = {w.data(), 1, 60};
  columns.act = relu, columns.bias = b.data();
  product("few columns, forward", columns, false, 1, table.few_columns_forward);
  good &= same_on_any_number_of_threads(
      "few columns, backward", {columns.m * 60, 11 * 60, 11}, [&](Results& r, const Parallel& parallel) {
        ColumnsBackward p = {columns.m, 11, 60, {g.data(), 11, 1}, {y.data(), 11, 1}, relu, {w.data(), 60, 1}};
        p.x = columns.a;
        p.dx = r[0].data(), p.dweight = r[1].data(), p.dbias = r[2].data();
        std::vector<float> partials(column_slices(p.m) * 11 * 61);
        p.partials = partials.data();
        table.few_columns_backward(p, parallel);
      });

  auto grad_pass = [&](const float* grad, const float* saved, int64_t columns) {
    return [=, &table](Results& r, const Parallel& parallel) {
      std::vector<float> partials(slices(m) * columns);
      table.grad_pass({DType::f32,
                       m,
                       columns,
                       {grad, columns, 1},
                       {saved, columns, 1},
                       relu,
                       r[0].data(),
                       r[1].data(),
                       OutputMode::cast,
                       partials.data()},
                      parallel);
    };
  };
  good &= same_on_any_number_of_threads("dz and dbias", {m * n, n}, grad_pass(g.data(), y.data(), n));
  // so many columns and so few slices that threads share a slice
  good &= same_on_any_number_of_threads("dz and dbias of many columns", {m * k, k}, grad_pass(x.data(), x.data(), k));
  good &= same_on_any_number_of_threads(
      "update", {m * k, m * k, m * k, n, n, n}, [&](Results& r, const Parallel& parallel) {
        for (int i = 0; i < 3; ++i) {
          std::copy(x.begin(), x.end(), r[i].begin());
          std::copy(b.begin(), b.end(), r[3 + i].begin());
        }
        for (int i : {2, 5})
          for (float& square : r[i]) square *= square;
        const UpdatedTensor tensors[] = {{m * k, r[0].data(), x.data(), r[1].data(), r[2].data(), nullptr, 0.1, 0.5},
                                         {n, r[3].data(), b.data(), r[4].data(), r[5].data(), nullptr, 0.1, 0.5}};
        table.update({UpdateRule::adam, false, false, 0.1, 0.01, 0.99, 1e-8, 0, 0.9, tensors, 2}, parallel);
      });
  good &= same_on_any_number_of_threads("activation", {m * k}, [&](Results& r, const Parallel& parallel) {
    table.act_pass({m * k, x.data(), {Act::gelu, 0}, r[0].data()}, parallel);
  });
  good &=
      same_on_any_number_of_threads("bias and activation", {m * k, m * k}, [&](Results& r, const Parallel& parallel) {
        table.bias_act_pass({m, k, x.data(), w.data(), {Act::gelu, 0}, r[0].data(), r[1].data()}, parallel);
      });

  good &= same_on_any_number_of_threads("gate and up", {m * n}, [&](Results& r, const Parallel& parallel) {
    table.glu_pass({m, n, g.data(), y.data(), n, {Act::gelu, 0}, r[0].data()}, parallel);
  });
  good &=
      same_on_any_number_of_threads("gate and up side by side", {m * 30}, [&](Results& r, const Parallel& parallel) {
        table.glu_pass({m, 30, g.data(), g.data() + 30, n, {Act::gelu, 0}, r[0].data()}, parallel);
      });
  good &= same_on_any_number_of_threads("both dz and dbias of a gated layer", {m * n, m * n, n, n},
                                        [&](Results& r, const Parallel& parallel) {
                                          std::vector<float> partials(2 * slices(m) * n);
                                          table.glu_grad_pass({DType::f32,
                                                               m,
                                                               n,
                                                               {g.data(), n, 1},
                                                               {y.data(), n, 1},
                                                               {x.data(), n, 1},
                                                               {Act::silu, 0},
                                                               r[0].data(),
                                                               r[1].data(),
                                                               n,
                                                               r[2].data(),
                                                               r[3].data(),
                                                               partials.data()},
                                                              parallel);
                                        });

  const auto weights = normal(3 * 64 * 64, 6);
  const int64_t rows = 2 * m, size = rows * 64;  // 8 blocks
  const auto input = normal(size, 7), grad = normal(size, 8);
  good &= same_on_any_number_of_threads("fused_mlp", {size, size, size, 4096, 4096, 4096, 64, 64, 64, size},
                                        [&](Results& r, const Parallel& parallel) {
                                          FusedMlpLayer layers[3]{};
                                          for (int l = 0; l < 3; ++l) {
                                            layers[l].n = layers[l].k = 64;
                                            layers[l].weight = {weights.data() + l * 4096, 64, 1};
                                            layers[l].act = relu;
                                            layers[l].h = r[l].data();
                                          }
                                          FusedMlp p{};
                                          p.rows = rows, p.layers = 3, p.layer = layers, p.x = {input.data(), 64, 1};
                                          table.fused_mlp.forward(p, parallel);
                                          for (int l = 0; l < 3; ++l)
                                            layers[l].dweight = r[3 + l].data(), layers[l].dbias = r[6 + l].data();
                                          p.grad_y = {grad.data(), 64, 1}, p.dx = r[9].data();
                                          p.slices = 6;  // 74,880 accumulators: all threads add them
                                          std::vector<float> partials(p.slices * fused_mlp_parameters(p));
                                          p.partials = partials.data();
                                          table.fused_mlp.backward(p, parallel);
                                        });

  std::vector<int64_t> target(m);
  for (int64_t i = 0; i < m; ++i) target[i] = i * 7 % n;
  good &= same_on_any_number_of_threads("cross entropy", {m, m * n}, [&](Results& r, const Parallel& parallel) {
    cpu::CrossEntropy p{};
    p.outer = 1, p.classes = n, p.inner = m;
    p.x = g.data(), p.x_strides = p.grad_strides = {0, 1, n};
    p.target = target.data(), p.ignore_index = -100, p.weight_sum = n, p.scale = 1;
    p.loss = r[0].data(), p.grad = r[1].data(), p.grad_dtype = DType::f32;
    std::vector<double> sums(loss_slices(p));
    p.sums = sums.data();
    table.losses.cross_entropy(p, parallel);
  });
  good &= same_on_any_number_of_threads("squared error", {m * k, m * k}, [&](Results& r, const Parallel& parallel) {
    cpu::ElementwiseLoss p{};
    const auto other = normal(m * k, 9);
    p.rows = m, p.cols = k, p.input = {x.data(), k, 1}, p.target = {other.data(), k, 1}, p.divisor = 1;
    p.loss = r[0].data(), p.grad_input = r[1].data();
    std::vector<double> sums(loss_slices(p));
    std::vector<uint8_t> negative(sums.size());
    p.sums = sums.data(), p.negative = negative.data();
    table.losses.squared_error(p, parallel);
  });
  return good ? 0 : 1;
}
