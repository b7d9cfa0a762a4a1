#include "kernels/cpu/isa/amx_check.h"

#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlk::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// Return whether the operating system saves tiles on a context switch.
__attribute__((target("xsave"))) bool tiles_are_saved() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  constexpr unsigned long long kTileConfigAndData = 3 << 17;
  return (_xgetbv(0) & kTileConfigAndData) == kTileConfigAndData;
}
#endif

using Bf16 = uint16_t;  // as it lies in memory

// Exact up to ±256.
Bf16 bf16(int value) {
  const float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return static_cast<Bf16>(bits >> 16);
}

// Return `count` numbers out of -1, 0 and 1. A sum of 600 of them, or of 600 products of two, stays far below 256: its
// standard deviation is at most 20.
std::vector<int> numbers(int64_t count, uint32_t seed) {
  std::vector<int> all(count);
  for (int& number : all) {
    seed = seed * 1664525 + 1013904223;
    number = static_cast<int>((seed >> 16) % 3) - 1;
  }
  return all;
}

std::vector<Bf16> tensor(const std::vector<int>& values) {
  std::vector<Bf16> t;
  for (const int value : values) t.push_back(bf16(value));
  return t;
}

}  // namespace

bool amx_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;  // of Linux 5.16 on, asm/prctl.h
  return tiles_are_saved() && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

bool multiplies_exactly(void (*gemm)(const Gemm&, const Parallel&)) {
  // These sizes give micro-tiles of one and of two tiles in either direction, and two k blocks; the last k block does
  // not fill whole tiles.
  constexpr int64_t m = 37, n = 41, k = 600;
  const std::vector<int> a = numbers(m * k, 1), b = numbers(k * n, 2);
  std::vector<int> ab(m * n), row_sums(m);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) {
      row_sums[i] += a[i * k + p];
      for (int64_t j = 0; j < n; ++j) ab[i * n + j] += a[i * k + p] * b[p * n + j];
    }
  std::vector<int> a_transposed(m * k), b_transposed(k * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) a_transposed[p * m + i] = a[i * k + p];
  for (int64_t p = 0; p < k; ++p)
    for (int64_t j = 0; j < n; ++j) b_transposed[j * k + p] = b[p * n + j];

  const Parallel alone = {1, [](int64_t tasks, const void* context, void (*body)(const void*, int64_t, int64_t)) {
                            body(context, 0, tasks);
                          }};
  std::vector<Bf16> c(m * n), sums(m);
  Gemm p{};
  p.dtype = DType::bf16;
  p.m = m, p.n = n, p.k = k;
  p.c = c.data();
  p.splits = 1;

  const std::vector<Bf16> x = tensor(a), weight = tensor(b_transposed);  // as in forward: both are contiguous along k
  p.a = {x.data(), k, 1};
  p.b = {weight.data(), 1, k};
  gemm(p, alone);
  if (c != tensor(ab)) return false;

  const std::vector<Bf16> dz = tensor(a_transposed), input = tensor(b);  // as in wgrad: neither is contiguous along k
  p.a = {dz.data(), 1, m};
  p.b = {input.data(), n, 1};
  p.row_sum = sums.data();
  c.assign(c.size(), 0);
  gemm(p, alone);
  return c == tensor(ab) && sums == tensor(row_sums);
}

}  // namespace dlk::cpu
