// C = epilogue(A · B) on Hopper's tensor cores (sm_90a), bf16 and fp16: the three products of a layer (params.h).
//
// Blocks are persistent. Of a block's three warpgroups one brings tiles of A and B by TMA into a ring of stages in
// shared memory, far ahead; the other two multiply them by wgmma, 64 rows of the tile of C each, and run the epilogue
// that the mma.sync kernel runs, while the ring fills for the next tile. Sums are f32, k is summed in one fixed order,
// nothing is atomic. Written on the instructions and not on CUTLASS: measuring one against the other needs a GPU, and
// this has run on none yet, only on the host model of these instructions in tests/emulation/hopper.
#pragma once

#include "kernels/cuda/gemm/tile.cuh"
#include "kernels/cuda/gemm/hopper/ring.h"

#ifdef __CUDACC__
#include "kernels/cuda/gemm/hopper/ptx_hopper.cuh"
#else
#include <ptx_hopper_on_host.h>
#endif

// The host's pass, and the device's for sm_90a. Elsewhere the kernels are empty, and may be launched with one thread only:
// a launch fails instead of doing nothing.
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
  static_assert(kStages >= 4 && kSharedBytes <= 227 * 1024, "what a block of sm_90 may have");
  static_assert(kStageBytes % 1024 == 0 && A::kBytes % 1024 == 0 && kBarriersAt % 8 == 0);

  // A launch gives 65536 / kThreads = 170 registers a thread, in steps of 8. The loader hands most of its on.
  static constexpr int kRegistersAtLaunch = 168, kLoaderRegisters = 40, kRegisters = 232;
  static_assert(kLoaderRegisters + kGroups * kRegisters <= (kGroups + 1) * kRegistersAtLaunch);
};

// The stages and their barriers, in shared memory.
template <class Traits>
struct Ring {
  unsigned char* shared;

  DLK_DEVICE unsigned char* a(int stage) const { return shared + stage * Traits::kStageBytes; }
  DLK_DEVICE unsigned char* b(int stage) const { return a(stage) + Traits::A::kBytes; }
  DLK_DEVICE uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(shared + Traits::kBarriersAt) + stage;
  }
  DLK_DEVICE uint64_t* empty(int stage) const { return full(Traits::kStages) + stage; }

  // By one thread, before any other uses the ring.
  DLK_DEVICE void init() const {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(full(stage), 1);                     // the loader, and the bytes it announces
      mbarrier_init(empty(stage), Traits::kGroups * 4);  // every warp that reads
    }
    fence_barrier_init();
  }
};

// The tiles of this block in turn: f(i0, j0, k0, steps) of the first row, column and k, and the tiles along k.
// blockIdx.z is the slice of k, whose length is a function of the shape and of p.splits alone.
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

// Rows i ... of A or columns i ... of B, and kTileK steps from k on.
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

// By one thread.
template <class Traits>
DLK_DEVICE void load_tiles(const Gemm& p, const Ring<Traits>& ring, const CUtensorMap* map_a,
                           const CUtensorMap* map_b) {
  RingPlace<Traits::kStages> place;
  for_each_tile<Traits>(p, [&](int64_t i0, int64_t j0, int64_t k0, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
      const int stage = place.stage;
      mbarrier_wait(ring.empty(stage), place.parity ^ 1);  // the time before; the first time round, at once
      mbarrier_arrive_expect(ring.full(stage), Traits::kStageBytes);
      load_operand<typename Traits::A>(ring.a(stage), map_a, i0, k0 + step * Traits::kTileK, ring.full(stage));
      load_operand<typename Traits::B>(ring.b(stage), map_b, j0, k0 + step * Traits::kTileK, ring.full(stage));
      place.advance();
    }
  });
}

// Adds up the values that the four warps of a group stored in 64 columns, to one row of partials per 64 rows of C. `strips` are
// the group's.
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

// By the four warps of a group, on rows 64 * group ... of every tile.
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
    int read = 0;  // the stage before
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
      wgmma_wait<1>();  // tensor cores have the next group at hand while the stage before goes back
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
      for (int of = 0; of < Traits::kParts; ++of)  // registers have no index at run time
        if (of == part) Strip::to_shared(strip, acc[of]);
      float column_sum[Strip::kWidth] = {};
      Strip::store(p, i0 + 16 * warp, j0, packs, strip, column_sum);
      if (p.column_sum) store_column_sums<Traits>(p, i0, j0, group, strips, column_sum);
    }
  });
}

// blockIdx.x is the first tile, gridDim.x tiles lie between two of a block, blockIdx.z is the slice of k.
template <class Traits>
__global__ void __launch_bounds__(DLK_HOPPER ? Traits::kThreads : 1, 1)
    hopper_gemm_kernel(const Gemm p, const __grid_constant__ CUtensorMap map_a,
                       const __grid_constant__ CUtensorMap map_b) {
#if DLK_HOPPER
  const Ring<Traits> ring{dynamic_shared()};
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  // One value for the warp, and known as such to the compiler.
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
