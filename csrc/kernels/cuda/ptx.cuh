// The PTX instructions that kernels use, one function each. tests/emulation/cuda/ptx_on_host.h does the same in C++.
#pragma once

#include <cstdint>

#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

DLK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The block's dynamic shared memory, aligned for TMA's 128-byte swizzling.
DLK_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dlk_dynamic_shared[];
  return dlk_dynamic_shared;
}

// Copy `bytes` (0 to 16) from global to shared memory, without registers, and zero the rest of 16. Both addresses are
// 16-byte aligned. The copy is complete after cp_async_wait, and visible to other threads after a barrier.
DLK_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// The same for 4 bytes, 4-byte aligned.
DLK_DEVICE void cp_async_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
DLK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most kPending of this thread's groups are incomplete.
template <int kPending>
DLK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Load four 8 × 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned). From every matrix it gets the element [l / 4][2(l % 4)] and the one after it.
DLK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same from the transposed matrices: the element [2(l % 4)][l / 4] and the one below it.
DLK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// D[16, 8] += A[16, 16] · B[16, 8] by a warp, elements of 16 bits, sums in f32. With g = lane / 4, t = lane % 4, and
// registers that hold two elements of a row, where t counts registers along k, a lane has
//
//   a[0] A[g][t]   a[1] A[g + 8][t]   a[2] A[g][t + 4]   a[3] A[g + 8][t + 4]
//   b[0] B[t][g]   b[1] B[t + 4][g]
//   d[0], d[1] D[g][2t], D[g][2t + 1]   d[2], d[3] the same in row g + 8
DLK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DLK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace dlk::cuda
