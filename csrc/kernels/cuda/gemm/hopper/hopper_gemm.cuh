// C = epilogue(A · B) on Hopper's tensor cores (sm_90a), bf16 and fp16: the three products of a layer (params.h).
//
// Blocks are persistent. A block has three warpgroups. One loads tiles of A and B by TMA into a ring of stages in
// shared memory, far ahead. The other two multiply them by wgmma, each 64 rows of the tile of C, and run the same
// epilogue as the mma.sync kernel while the ring fills for the next tile. Sums are f32, k is summed in one fixed order,
// and nothing is atomic. The kernel is written in PTX instructions and not with CUTLASS. A comparison of the two needs
// a GPU, and this kernel has not run on one yet, only on the host model of these instructions in
// tests/emulation/hopper.
#pragma once

#include "kernels/cuda/gemm/tile.cuh"
#include "kernels/cuda/gemm/hopper/ring.h"

#ifdef __CUDACC__
#include "kernels/cuda/gemm/hopper/ptx_hopper.cuh"
#else
#include <ptx_hopper_on_host.h>
#endif

// True in the compiler's pass for the host and in its pass for sm_90a. For other devices the kernels are empty and may
// be launched with only one thread, so that a launch fails and does not silently do nothing.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DLK_HOPPER true
#else
#define DLK_HOPPER false
#endif

namespace dlk::cuda {

template <class T_, bool kAAlongK_, bool kBAlongK_, int kTileN_>
struct HopperTraits {
  using T = T_;
  static constexpr bool kAAlongK = kAAlongK_, kBAlongK = kBAlongK_;
  static constexpr int kGroups = 2;  // warpgroups that multiply; one more loads
  static constexpr int kGroupThreads = 128, kThreads = kGroupThreads * (kGroups + 1);
  static constexpr int kTileM = 64 * kGroups, kTileN = kTileN_, kTileK = 64, kParts = kTileN / 64;
  using A = SharedOperand<kAAlongK, kTileM>;
  using B = SharedOperand<kBAlongK, kTileN>;
  using Strip = cuda::Strip<T, 64>;  // each warp has one
  static_assert(A::kSteps == kTileK && B::kSteps == kTileK);

  // Shared memory: stages, strips, barriers.
  static constexpr int kStageBytes = A::kBytes + B::kBytes, kStages = 192 * 1024 / kStageBytes;
  static constexpr int kStripsAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kStripsAt + kGroups * 4 * Strip::kBytes;
  static constexpr int kSharedBytes = (kBarriersAt + 2 * kStages * 8 + 1023) / 1024 * 1024;
  static_assert(kStages >= 4 && kSharedBytes <= 227 * 1024, "the limit of a block on sm_90");
  static_assert(kStageBytes % 1024 == 0 && A::kBytes % 1024 == 0 && kBarriersAt % 8 == 0);

  // A launch gives a thread 65536 / kThreads = 170 registers, rounded down to a multiple of 8. The loader gives most of
  // its registers to the warpgroups that multiply.
  static constexpr int kRegistersAtLaunch = 168, kLoaderRegisters = 40, kRegisters = 232;
  static_assert(kLoaderRegisters + kGroups * kRegisters <= (kGroups + 1) * kRegistersAtLaunch);
};

// The ring of stages and their barriers, in shared memory.
template <class Traits>
struct Ring {
  unsigned char* shared;

  DLK_DEVICE unsigned char* a(int stage) const { return shared + stage * Traits::kStageBytes; }
  DLK_DEVICE unsigned char* b(int stage) const { return a(stage) + Traits::A::kBytes; }
  DLK_DEVICE uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(shared + Traits::kBarriersAt) + stage;
  }
  DLK_DEVICE uint64_t* empty(int stage) const { return full(Traits::kStages) + stage; }

  // Set up the barriers. One thread calls it, before any other uses the ring.
  DLK_DEVICE void init() const {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(full(stage), 1);                     // arrivals: the loader; also the bytes that it announces
      mbarrier_init(empty(stage), Traits::kGroups * 4);  // arrivals: every warp that reads
    }
    fence_barrier_init();
  }
};

// Call f(i0, j0, k0, steps) for every tile of this block: its first row, column and k, and the number of tiles along k.
// blockIdx.z is the k-slice, whose length is a function of the shape and of p.splits alone.
template <class Traits, class F>
DLK_DEVICE void for_each_tile(const Gemm& p, F&& f) {
  const int64_t tiles_m = ceil_div(p.m, Traits::kTileM), tiles_n = ceil_div(p.n, Traits::kTileN);
  const int64_t all = ceil_div(p.k, Traits::kTileK), slice = ceil_div(all, p.splits), first = blockIdx.z * slice;
  const int64_t steps = max(int64_t{0}, min(slice, all - first));
  for (int64_t tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
    const TileAt at = tile_at(tile, tiles_m, tiles_n);
    f(at.i * Traits::kTileM, at.j * Traits::kTileN, first * Traits::kTileK, steps);
  }
}

// Load rows i ... of A or columns i ... of B, and kTileK steps from k on.
template <class Operand>
DLK_DEVICE void load_operand(unsigned char* tile, const CUtensorMap* map, int64_t i, int64_t k, uint64_t* full) {
  const auto row = static_cast<int32_t>(i), step = static_cast<int32_t>(k);
  if constexpr (Operand::kAlongK) {
    tma_load(tile, map, step, row, full);
  } else {
#pragma unroll
    for (int box = 0; box < Operand::kBoxes; ++box)
      tma_load(tile + box * Operand::kBoxBytes, map, row + box * 64, step, full);
  }
}

// The loader, which is one thread: fill the ring with all tiles of this block.
template <class Traits>
DLK_DEVICE void load_tiles(const Gemm& p, const Ring<Traits>& ring, const CUtensorMap* map_a,
                           const CUtensorMap* map_b) {
  RingPlace<Traits::kStages> place;
  for_each_tile<Traits>(p, [&](int64_t i0, int64_t j0, int64_t k0, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
      const int stage = place.stage;
      mbarrier_wait(ring.empty(stage), place.parity ^ 1);  // until it was emptied; the first time round, at once
      mbarrier_arrive_expect(ring.full(stage), Traits::kStageBytes);
      load_operand<typename Traits::A>(ring.a(stage), map_a, i0, k0 + step * Traits::kTileK, ring.full(stage));
      load_operand<typename Traits::B>(ring.b(stage), map_b, j0, k0 + step * Traits::kTileK, ring.full(stage));
      place.advance();
    }
  });
}

// Add up the column sums that the four warps of a group have of 64 columns, to one row of partials per 64 rows of C.
// `strips` is the memory of the group's strips.
template <class Traits>
DLK_DEVICE void store_column_sums(const Gemm& p, int64_t i0, int64_t j0, int group, float* strips,
                                  float (&column_sum)[Traits::Strip::kWidth]) {
  using Strip = typename Traits::Strip;
  constexpr int kPitch = Strip::kBytes / sizeof(float);  // from one warp's to the next
  const int thread = threadIdx.x % Traits::kGroupThreads, warp = thread / 32, lane = thread % 32;
  Strip::sum_rows(column_sum);
  if (lane < Strip::kLanesPerRow) {
#pragma unroll
    for (int e = 0; e < Strip::kWidth; ++e) strips[warp * kPitch + lane * Strip::kWidth + e] = column_sum[e];
  }
  barrier_sync(1 + group, Traits::kGroupThreads);
  if (thread < 64 && i0 < p.m && j0 + thread < p.n) {
    float sum = 0;
    for (int w = 0; w < 4; ++w) sum += strips[w * kPitch + thread];
    static_cast<float*>(p.partials)[i0 / 64 * p.n + j0 + thread] = sum;
  }
  barrier_sync(1 + group, Traits::kGroupThreads);  // the strips are free again
}

// Multiply and store all tiles of this block. The four warps of a group call it, for rows 64 * group ... of every tile.
template <class Traits>
DLK_DEVICE void multiply_tiles(const Gemm& p, const Ring<Traits>& ring, int group) {
  using T = typename Traits::T;
  using Strip = typename Traits::Strip;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  auto* strips = reinterpret_cast<float*>(ring.shared + Traits::kStripsAt + group * 4 * Strip::kBytes);
  float* strip = strips + warp * (Strip::kBytes / sizeof(float));
  const bool packs = rows_allow_packs<T>(p);
  RingPlace<Traits::kStages> place;

  for_each_tile<Traits>(p, [&](int64_t i0, int64_t j0, int64_t, int64_t steps) {
    float acc[Traits::kParts][8][4] = {};
    int read = 0;  // the stage that was read before this one
    auto release = [&] {
      if (lane == 0) mbarrier_arrive(ring.empty(read));
    };
#pragma unroll 1
    for (int64_t step = 0; step < steps; ++step) {
      mbarrier_wait(ring.full(place.stage), place.parity);
      const uint32_t a = shared_address(ring.a(place.stage)), b = shared_address(ring.b(place.stage));
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < Traits::kTileK; s += 16)
        wgmma_mma<!Traits::kAAlongK, !Traits::kBAlongK>(acc, Traits::A::descriptor(a, 64 * group, s),
                                                        Traits::B::descriptor(b, 0, s), T{});
      wgmma_commit();
      wgmma_wait<1>();  // the tensor cores have this stage to do while the one before it is released
      if (step > 0) release();
      read = place.stage;
      place.advance();
    }
    wgmma_wait_all(acc);
    if (steps > 0) release();

    i0 += 64 * group;
#pragma unroll 1
    for (int part = 0; part < Traits::kParts; ++part, j0 += 64) {
#pragma unroll
      for (int q = 0; q < Traits::kParts; ++q)  // registers cannot be indexed at run time
        if (q == part) Strip::to_shared(strip, acc[q]);
      float column_sum[Strip::kWidth] = {};
      Strip::store(p, i0 + 16 * warp, j0, packs, strip, column_sum);
      if (p.column_sum) store_column_sums<Traits>(p, i0, j0, group, strips, column_sum);
    }
  });
}

// blockIdx.x is the first tile of the block, gridDim.x is the step to its next tile, blockIdx.z is the k-slice.
template <class Traits>
__global__ void __launch_bounds__(DLK_HOPPER ? Traits::kThreads : 1, 1)
    hopper_gemm_kernel(const Gemm p, const __grid_constant__ CUtensorMap map_a,
                       const __grid_constant__ CUtensorMap map_b) {
#if DLK_HOPPER
  const Ring<Traits> ring{dynamic_shared()};
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  // With the shuffle the compiler knows that the value is the same in all lanes of the warp.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / Traits::kGroupThreads, 0);
  if (group == Traits::kGroups) {
    release_registers<Traits::kLoaderRegisters>();
    if (threadIdx.x % Traits::kGroupThreads == 0) load_tiles(p, ring, &map_a, &map_b);
  } else {
    claim_registers<Traits::kRegisters>();
    multiply_tiles(p, ring, group);
  }
#endif
}

}  // namespace dlk::cuda
