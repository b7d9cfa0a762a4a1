// The PTX instructions of Hopper (sm_90a) that kernels use, one function each; the comments follow the PTX ISA.
// tests/emulation/hopper/ptx_hopper_on_host.h does the same in C++.
#pragma once

#include <cuda.h>

#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

// ---- mbarrier: an 8-byte object in shared memory ------------------------------------------------------------------
// A phase completes when `arrivals` threads have arrived and every announced byte has been written. Then the next phase
// begins with the same count. Phases are numbered from 0.

DLK_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Make the mbarrier_inits of this thread visible to the async proxy, from which TMA signals. A __syncthreads makes them
// visible to the block.
DLK_DEVICE void fence_barrier_init() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrive once. Whatever this thread did before is visible to a thread that sees the phase complete (release, acquire).
DLK_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive once, and announce `bytes` more bytes that this phase waits for.
DLK_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Wait until the phase of this parity is complete. It is the current phase, or the one before it, for which the wait
// ends at once. On a new barrier the phase "before" has parity 1. try_wait suspends the thread for a limited time,
// hence the loop.
DLK_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!complete);
}

// ---- TMA ----------------------------------------------------------------------------------------------------------

// Start to copy the box of the map whose first element is (column, row) to shared memory; one thread calls it. column
// counts along the contiguous direction. With 128-byte swizzling the address is a multiple of 1024 bytes. Elements
// outside the tensor are zero. `barrier` counts all bytes of the box as they are written, zeros too.
DLK_DEVICE void tma_load(void* shared, const CUtensorMap* map, int32_t column, int32_t row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// ---- wgmma: by the four warps of a warpgroup, aligned, together ----------------------------------------------------

// Needed before the first wgmma_mma, and before one whose registers were accessed since the last one.
DLK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DLK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most kPending of the latest groups are incomplete. The operands of the others may be overwritten then.
// The sums may be used only after wgmma_wait_all, which takes `d` so that the compiler moves no use of it ahead of the
// wait.
template <int kPending>
DLK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kParts>
DLK_DEVICE void wgmma_wait_all(float (&d)[kParts][8][4]) {
  wgmma_wait<0>();
#pragma unroll
  for (auto& part : d) {
#pragma unroll
    for (auto& f : part) {
#pragma unroll
      for (float& sum : f) asm volatile("" : "+f"(sum)::"memory");
    }
  }
}

// D[64, N] += A[64, 16] · B[16, N], 16-bit elements, sums in f32, both operands in shared memory (ring.h has the
// descriptors). kAcrossA, kAcrossB: the operand is contiguous along m, along n, and not along k. Warp w of the group
// has rows 16w ... 16w + 15. In these rows d[c][f] is columns 64c + 8f ... + 7, laid out as d of mma (ptx.cuh).
#define DLK_TEN(tens)                                                                                               \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens \
  "8, %" #tens "9, "
#define DLK_SUMS_4(c, f) "+f"(d[c][f][0]), "+f"(d[c][f][1]), "+f"(d[c][f][2]), "+f"(d[c][f][3])
#define DLK_SUMS_16(c, f) DLK_SUMS_4(c, f), DLK_SUMS_4(c, f + 1), DLK_SUMS_4(c, f + 2), DLK_SUMS_4(c, f + 3)
#define DLK_SUMS_64(c) DLK_SUMS_16(c, 0), DLK_SUMS_16(c, 4), DLK_SUMS_16(c + 1, 0), DLK_SUMS_16(c + 1, 4)
#define DLK_WGMMA(Type, type)                                                                                        \
  template <bool kAcrossA, bool kAcrossB>                                                                            \
  DLK_DEVICE void wgmma_mma(float (&d)[2][8][4], uint64_t a, uint64_t b, Type) {                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" DLK_TEN() DLK_TEN(1) DLK_TEN(2)   \
                     DLK_TEN(3) DLK_TEN(4) DLK_TEN(5) "%60, %61, %62, %63}, %64, %65, 1, 1, 1, %66, %67;"            \
                 : DLK_SUMS_64(0)                                                                                    \
                 : "l"(a), "l"(b), "n"(int{kAcrossA}), "n"(int{kAcrossB}));                                          \
  }                                                                                                                  \
  template <bool kAcrossA, bool kAcrossB>                                                                            \
  DLK_DEVICE void wgmma_mma(float (&d)[4][8][4], uint64_t a, uint64_t b, Type) {                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" DLK_TEN() DLK_TEN(1) DLK_TEN(2) \
                     DLK_TEN(3) DLK_TEN(4) DLK_TEN(5) DLK_TEN(6) DLK_TEN(7) DLK_TEN(8) DLK_TEN(9) DLK_TEN(10)     \
                         DLK_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127}, "                          \
                                     "%128, %129, 1, 1, 1, %130, %131;"                                           \
                 : DLK_SUMS_64(0), DLK_SUMS_64(2)                                                                 \
                 : "l"(a), "l"(b), "n"(int{kAcrossA}), "n"(int{kAcrossB})); \
  }
DLK_WGMMA(Bf16, "bf16")
DLK_WGMMA(F16, "f16")
#undef DLK_WGMMA
#undef DLK_SUMS_64
#undef DLK_SUMS_16
#undef DLK_SUMS_4
#undef DLK_TEN

// ---- setmaxnreg, bar -----------------------------------------------------------------------------------------------

// Set the registers per thread of this warpgroup from here on, a multiple of 8 in 24 ... 256; all its warps call it.
// release: the others go back to the pool of the block. claim: wait until the pool has enough.
template <int kRegisters>
DLK_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DLK_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Wait at a barrier of `threads` threads, which are whole warps. Barrier 0 is the one of __syncthreads.
DLK_DEVICE void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace dlk::cuda
