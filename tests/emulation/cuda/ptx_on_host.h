// csrc/kernels/cuda/ptx.cuh in C++. Each function does what the PTX manual says about its instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace dlk::cuda {

inline unsigned char* dynamic_shared() { return cuda_emulation::dynamic_shared.data; }

inline void check_aligned(const void* p, const char* what, int to = 16) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(to)) cuda_emulation::die(what);
}

// Until the thread waits for the copy, the destination holds the bits of NaN, which a thread that reads too early sees.
inline void cp_async(void* shared, const void* global, int bytes, int size) {
  check_aligned(shared, "cp.async to an address that is not aligned to its size", size);
  check_aligned(global, "cp.async from an address that is not aligned to its size", size);
  cuda_emulation::races::access(shared, static_cast<size_t>(size), true, nullptr);
  const cuda_emulation::races::Quiet quiet;
  std::memset(shared, 0xff, static_cast<size_t>(size));
  cuda_emulation::current->open.push_back({shared, global, bytes, size});
}
inline void cp_async_16(void* shared, const void* global, int bytes) { cp_async(shared, global, bytes, 16); }
inline void cp_async_4(void* shared, const void* global, int bytes) { cp_async(shared, global, bytes, 4); }
inline void cp_async_commit() {
  const cuda_emulation::races::Quiet quiet;
  auto* fiber = cuda_emulation::current;
  fiber->groups.push_back(std::move(fiber->open));
  fiber->open.clear();
}
template <int kPending>
void cp_async_wait() {
  const cuda_emulation::races::Quiet quiet;
  auto& groups = cuda_emulation::current->groups;
  while (groups.size() > kPending) {
    for (const cuda_emulation::Copy& copy : groups.front()) {
      cuda_emulation::races::access(copy.to, static_cast<size_t>(copy.size), true, nullptr);
      cuda_emulation::races::access(copy.from, static_cast<size_t>(copy.bytes), false, nullptr);
      std::memset(copy.to, 0, static_cast<size_t>(copy.size));
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    groups.erase(groups.begin());
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  check_aligned(row, "ldmatrix from an address that is not 16-byte aligned");
  const auto rows = cuda_emulation::exchange(row, "ldmatrix");
  const unsigned lane = threadIdx.x % 32;
  for (unsigned q = 0; q < 4; ++q)
    std::memcpy(&r[q], static_cast<const unsigned char*>(rows[q * 8 + lane / 4]) + lane % 4 * 4, 4);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  check_aligned(row, "ldmatrix from an address that is not 16-byte aligned");
  const auto rows = cuda_emulation::exchange(row, "ldmatrix.trans");
  const unsigned lane = threadIdx.x % 32;
  for (unsigned q = 0; q < 4; ++q) {
    uint16_t low, high;
    std::memcpy(&low, static_cast<const unsigned char*>(rows[q * 8 + lane % 4 * 2]) + lane / 4 * 2, 2);
    std::memcpy(&high, static_cast<const unsigned char*>(rows[q * 8 + lane % 4 * 2 + 1]) + lane / 4 * 2, 2);
    r[q] = low | uint32_t{high} << 16;
  }
}

// Return the k-th element of a register.
inline float element(uint32_t r, unsigned k, Bf16) { return widen(Bf16{static_cast<uint16_t>(r >> 16 * k)}); }
inline float element(uint32_t r, unsigned k, F16) {
  const auto bits = static_cast<uint16_t>(r >> 16 * k);
  F16 v;
  std::memcpy(&v, &bits, 2);
  return widen(v);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  constexpr unsigned kElements = 2;  // of a register
  struct Operands {
    float a[4][kElements], b[2][kElements];
  } mine;
  for (unsigned e = 0; e < kElements; ++e) {
    for (unsigned r = 0; r < 4; ++r) mine.a[r][e] = element(a[r], e, T{});
    for (unsigned r = 0; r < 2; ++r) mine.b[r][e] = element(b[r], e, T{});
  }
  const auto all = cuda_emulation::exchange(mine, "mma");
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  double sum[4] = {d[0], d[1], d[2], d[3]};
  for (unsigned k = 0; k < 4; ++k) {  // registers along k; each holds elements k and, in its other half, k + 4
    const Operands rows = all[g * 4 + k], cols[2] = {all[t * 8 + k], all[t * 8 + 4 + k]};
    for (unsigned half = 0; half < 2; ++half)
      for (unsigned e = 0; e < kElements; ++e)
        for (unsigned i = 0; i < 4; ++i)  // of D[g + 8 (i / 2)][2t + i % 2]
          sum[i] += double{rows.a[i / 2 + half * 2][e]} * double{cols[i % 2].b[half][e]};
  }
  for (unsigned i = 0; i < 4; ++i) d[i] = static_cast<float>(sum[i]);
}

}  // namespace dlk::cuda
