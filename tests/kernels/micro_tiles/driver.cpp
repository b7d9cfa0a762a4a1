// The three packed products of a layer, with micro-tiles of DLK_MR rows in vectors of 16 bytes, which any processor has. Prints
// every product that errs, beside sums in f64, and exits with 1 if there is one.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#define DLK_ISA micro_tiles
#define DLK_VBYTES 16
#define DLK_NV 2
#define DLK_DOT_M 2
#define DLK_DOT_N 2
#include "kernels/cpu/isa/kernel_set.h"

namespace dlk::cpu {

void* scratch(size_t bytes) {
  static std::vector<char> memory;
  memory.assign(bytes + 64, '\xff');  // as floats these are NaN: nothing may be read before it is written
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<void*>((at + 63) / 64 * 64);
}

namespace micro_tiles {

using E = Convert<float>;
std::mt19937 generator{1};
int failed = 0;

std::vector<float> random(int64_t count) {
  std::uniform_real_distribution<float> uniform(-0.5f, 0.5f);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(generator);
  return values;
}

// Tiles for `threads` threads, which this one computes one after the other.
void multiply(Gemm p, int threads) {
  const Parallel serial = {threads,
                           [](int64_t tasks, const void* context, void (*body)(const void*, int64_t, int64_t)) {
                             if (tasks > 0) body(context, 0, tasks);
                           }};
  p.dtype = DType::f32, p.splits = 1;
  std::vector<char> panels(panels_size<E>(p, threads));
  if (!panels.empty()) p.panels = panels.data();
  gemm_with<E>(p, serial);
}

float at(const View& v, int64_t i, int64_t j) {
  return static_cast<const float*>(v.data)[i * v.row_stride + j * v.col_stride];
}

// Compare C with act(A · B + bias), where `a` and `b` return the elements. The error is in units of the terms' magnitude.
template <class A, class B, class Act>
void compare(const char* product, const Gemm& p, int threads, const std::vector<float>& c, A a, B b, Act act) {
  double worst = 0;
  for (int64_t i = 0; i < p.m; ++i)
    for (int64_t j = 0; j < p.n; ++j) {
      double sum = p.bias ? static_cast<const float*>(p.bias)[j] : 0, size = 1;
      for (int64_t q = 0; q < p.k; ++q) {
        const double term = static_cast<double>(a(i, q)) * b(q, j);
        sum += term, size += std::fabs(term);
      }
      const double error = std::fabs(act(sum) - c[i * p.n + j]) / size;
      if (!(error <= worst)) worst = error;
    }
  if (worst <= 1e-6) return;
  std::printf("%s %ldx%ldx%ld, %d threads: error %g\n", product, long(p.m), long(p.k), long(p.n), threads, worst);
  ++failed;
}

void layer(int64_t m, int64_t k, int64_t n, Act kind, bool with_bias, bool with_z, int threads) {
  const auto x = random(m * k), weight = random(n * k), bias = random(n), g = random(m * n);
  std::vector<float> y(m * n), z(m * n), dx(m * k), dweight(n * k), dbias(n);
  const auto element = [](const View& v) { return [v](int64_t i, int64_t j) { return at(v, i, j); }; };
  const double slope = 0.25;

  Gemm forward{};
  forward.m = m, forward.n = n, forward.k = k;
  forward.a = contiguous_view(k, x.data()), forward.b = contiguous_view(k, weight.data()).transposed();
  forward.act = {kind, slope}, forward.c = y.data();
  if (with_bias) forward.bias = bias.data();
  if (with_z) forward.z = z.data();
  multiply(forward, threads);
  const auto act = [&](double s) { return kind == Act::none || s > 0 ? s : kind == Act::relu ? 0 : slope * s; };
  compare("forward", forward, threads, y, element(forward.a), element(forward.b), act);
  const auto identity = [](double s) { return s; };
  if (with_z) compare("preactivation", forward, threads, z, element(forward.a), element(forward.b), identity);
  if (kind != Act::relu) return;

  Gemm dgrad{};
  dgrad.m = m, dgrad.n = k, dgrad.k = n;
  dgrad.a = contiguous_view(n, g.data()), dgrad.saved = contiguous_view(n, y.data());
  dgrad.b = contiguous_view(k, weight.data());
  dgrad.act = forward.act, dgrad.c = dx.data();
  multiply(dgrad, threads);
  const auto dz = [&](int64_t i, int64_t j) { return y[i * n + j] > 0 ? g[i * n + j] : 0; };
  compare("dgrad", dgrad, threads, dx, dz, element(dgrad.b), identity);
  Gemm below = dgrad;  // x is the output of a layer with ReLU, whose dz this makes
  below.below_saved = x.data(), below.below_act = {Act::relu, 0};
  auto masked = random(m * k);
  below.c = masked.data();
  multiply(below, threads);
  for (int64_t i = 0; i < m * k; ++i) dx[i] = x[i] > 0 ? dx[i] : 0;
  if (masked != dx) std::printf("dz of the layer below %ldx%ldx%ld differs\n", long(m), long(k), long(n)), ++failed;

  Gemm wgrad{};
  wgrad.m = n, wgrad.n = k, wgrad.k = m;
  wgrad.a = dgrad.a.transposed(), wgrad.saved = dgrad.saved.transposed();
  wgrad.b = forward.a;
  wgrad.act = forward.act, wgrad.c = dweight.data(), wgrad.row_sum = dbias.data();
  multiply(wgrad, threads);
  const auto dz_t = [&](int64_t i, int64_t j) { return dz(j, i); };
  compare("wgrad", wgrad, threads, dweight, dz_t, element(wgrad.b), identity);
  Gemm sums = wgrad;
  sums.n = 1;
  compare("dbias", sums, threads, dbias, dz_t, [](int64_t, int64_t) { return 1.0f; }, identity);
}

}  // namespace micro_tiles
}  // namespace dlk::cpu

int main() {
  using namespace dlk::cpu::micro_tiles;
  // At the edges of micro-tiles, of sums and of blocks; products multiplied as their transpose; totals.
  const int64_t shapes[][3] = {{1, 1, 1},      {14, 32, 8},    {28, 64, 64},    {29, 65, 67},
                               {100, 300, 77}, {337, 129, 70}, {24, 200, 60},   {40, 331, 100},
                               {70, 700, 96},  {180, 784, 96}, {340, 1100, 30}, {24, 9000, 50}};
  int products = 0;
  for (const auto& [m, k, n] : shapes)
    for (const dlk::Act act : {dlk::Act::none, dlk::Act::relu, dlk::Act::leaky_relu})
      for (const bool bias : {true, false})
        for (const bool z : {true, false}) layer(m, k, n, act, bias, z, ++products % 2 ? 1 : 8);
  std::printf("%d layers, %d errors\n", products, failed);
  return failed > 0;
}
