// C = epilogue(A · B) on tensor cores (sm_80 and later): the three products of a layer (table in params.h).
//
// A block makes a tile of C. Tiles of A and B of kTileK steps pass through shared memory in kStages stages: while one
// stage is multiplied, the next ones are loaded (cp.async). Sums are f32, k is summed in one fixed order, and nothing
// is atomic.
#pragma once

#include "kernels/cuda/gemm/operand.cuh"
#include "kernels/cuda/gemm/tile.cuh"

namespace dlk::cuda {

template <class T_, bool kAAlongK_, bool kBAlongK_, int kWarpM_, int kWarpN_>
struct MmaTraits {
  using T = T_;
  static constexpr bool kAAlongK = kAAlongK_, kBAlongK = kBAlongK_;
  static constexpr int kWarpM = kWarpM_, kWarpN = kWarpN_;  // of C per warp
  static constexpr int kWarpsM = 2, kWarpsN = 2, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kTileM = kWarpM * kWarpsM, kTileN = kWarpN * kWarpsN;
  static constexpr int kTileK = 32;  // rows of 64 bytes: two steps of mma
  static constexpr int kStages = 4;
  using A = Operand<T, kAAlongK, kTileM, kTileK, kThreads>;
  using B = Operand<T, kBAlongK, kTileN, kTileK, kThreads>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  using Strip = cuda::Strip<T, kWarpN>;  // each warp has one
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  static_assert(kThreads / 32 * Strip::kBytes <= kSharedBytes);
  // A thread of the large tile holds 128 sums: two such blocks, 255 registers each, fill the registers of an SM.
  static constexpr int kBlocksPerSM = kWarpM * kWarpN > 32 * 32 ? 2 : 3;
};

// Multiply one stage for the tile of this warp.
template <class Traits>
DLK_DEVICE void multiply(const unsigned char* a, const unsigned char* b, int warp_m, int warp_n,
                         float (&acc)[Traits::kWarpM / 16][Traits::kWarpN / 8][4]) {
  using T = typename Traits::T;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t fa[Traits::kWarpM / 16][4], fb[Traits::kWarpN / 16][4];
#pragma unroll
    for (int i = 0; i < Traits::kWarpM / 16; ++i)
      Traits::A::fragment_a(a, warp_m * Traits::kWarpM + i * 16, step, fa[i]);
#pragma unroll
    for (int j = 0; j < Traits::kWarpN / 16; ++j)
      Traits::B::fragment_b(b, warp_n * Traits::kWarpN + j * 16, step, fb[j]);
#pragma unroll
    for (int i = 0; i < Traits::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kWarpN / 8; ++j) {
        const uint32_t fragment[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
        mma(acc[i][j], fa[i], fragment, T{});
      }
    }
  }
}

// Store the row sums of A, which were added up while A was loaded (A not along k). A thread has the same kPack rows of
// A in each stage. The threads that share these rows are added up here, in a fixed order.
template <class Traits>
DLK_DEVICE void store_row_sums(const Gemm& p, int64_t i0, unsigned char* shared,
                               const float (&thread_sum)[kPack<typename Traits::T>]) {
  using T = typename Traits::T;
  constexpr int kSharers = Traits::kThreads / Traits::A::kChunks;
  auto* sums = reinterpret_cast<float*>(shared);  // [kSharers][kTileM]
  static_assert(kSharers * Traits::kTileM * sizeof(float) <= Traits::kSharedBytes);
  const int thread = threadIdx.x, chunk = thread % Traits::A::kChunks, sharer = thread / Traits::A::kChunks;
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) sums[sharer * Traits::kTileM + chunk * kPack<T> + e] = thread_sum[e];
  __syncthreads();
  for (int i = thread; i < Traits::kTileM && i0 + i < p.m; i += Traits::kThreads) {
    float sum = 0;
    for (int s = 0; s < kSharers; ++s) sum += sums[s * Traits::kTileM + i];
    if (p.splits > 1)
      static_cast<float*>(p.partials)[p.splits * p.m * p.n + blockIdx.z * p.m + i0 + i] = sum;
    else
      narrow(sum, static_cast<T*>(p.row_sum) + i0 + i);
  }
  __syncthreads();
}

// Store the tile of this warp, one strip of 16 rows after the other.
template <class Traits>
DLK_DEVICE void store_tile(const Gemm& p, int64_t i0, int64_t j0, float* strip,
                           const float (&acc)[Traits::kWarpM / 16][Traits::kWarpN / 8][4]) {
  using Strip = typename Traits::Strip;
  const bool packs = rows_allow_packs<typename Traits::T>(p);
  float column_sum[Strip::kWidth] = {};
#pragma unroll
  for (int s = 0; s < Traits::kWarpM / 16; ++s) {
    Strip::to_shared(strip, acc[s]);
    Strip::store(p, i0 + s * 16, j0, packs, strip, column_sum);
  }

  if (p.column_sum) {  // one row of partials per warp tile
    Strip::sum_rows(column_sum);
    const int lane = threadIdx.x % 32;
    const int64_t j = j0 + lane * Strip::kWidth;
    auto* partials = static_cast<float*>(p.partials) + i0 / Traits::kWarpM * p.n;
#pragma unroll
    for (int e = 0; e < Strip::kWidth; ++e)
      if (lane < Strip::kLanesPerRow && i0 < p.m && j + e < p.n) partials[j + e] = column_sum[e];
  }
}

// blockIdx.x is the tile of C, blockIdx.z the k-slice.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) mma_gemm_kernel(const Gemm p) {
  using T = typename Traits::T;
  unsigned char* shared = dynamic_shared();
  const int warp = threadIdx.x / 32, warp_m = warp / Traits::kWarpsN, warp_n = warp % Traits::kWarpsN;
  const TileAt at = tile_at(blockIdx.x, ceil_div(p.m, Traits::kTileM), ceil_div(p.n, Traits::kTileN));
  const int64_t i0 = at.i * Traits::kTileM, j0 = at.j * Traits::kTileN;
  const int64_t slice = ceil_div(ceil_div(p.k, Traits::kTileK), p.splits) * Traits::kTileK;
  const int64_t k_begin = blockIdx.z * slice, k_end = min(p.k, k_begin + slice);
  const int64_t steps = max(int64_t{0}, ceil_div(k_end - k_begin, Traits::kTileK));

  const auto a = Traits::A::source(p.a, p.m, k_end);
  const auto b = Traits::B::source(p.b.transposed(), p.n, k_end);
  const bool sums_rows = p.row_sum && j0 == 0;
  const bool a_async = a.asynchronous && !p.saved.data && !p.row_sum;
  float row_sum[kPack<T>] = {};

  typename Traits::B::Walk walk_b(b, j0, k_begin);
  float acc[Traits::kWarpM / 16][Traits::kWarpN / 8][4] = {};
  // load(stage, k0) is called for one stage after the other.
  auto multiply_steps = [&](auto&& load) {
    int64_t next = 0;      // step that is loaded next
    int to = 0, from = 0;  // bytes to the stages that are loaded and multiplied next
    auto advance = [](int& stage) {
      stage += Traits::kStageBytes;
      if (stage == Traits::kStages * Traits::kStageBytes) stage = 0;
    };
    auto load_stage = [&] {
      if (next < steps) load(shared + to, k_begin + next * Traits::kTileK);
      ++next;
      advance(to);
      cp_async_commit();  // also if there was nothing to load, because groups are counted
    };
#pragma unroll 1
    for (int step = 0; step < Traits::kStages - 1; ++step) load_stage();
#pragma unroll 1
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<Traits::kStages - 2>();
      __syncthreads();  // this stage is loaded, and all threads have read the one before it, which is loaded next
      load_stage();
      multiply<Traits>(shared + from, shared + from + Traits::A::kBytes, warp_m, warp_n, acc);
      advance(from);
    }
  };
  if (a_async && b.asynchronous) {
    typename Traits::A::Walk walk_a(a, i0, k_begin);
    multiply_steps([&](unsigned char* stage, int64_t) {
      walk_a.load(stage);
      walk_b.load(stage + Traits::A::kBytes);
    });
  } else {
    multiply_steps([&](unsigned char* stage, int64_t k0) {
      if constexpr (!Traits::kAAlongK) {  // wgrad: dz and dbias are made while A is loaded
        Traits::A::load_changed(stage, a, i0, k0, [&](int64_t row, int64_t col, int exist, float (&v)[kPack<T>]) {
          if (p.saved.data) {
            float saved[kPack<T>];
#pragma unroll
            for (int e = 0; e < kPack<T>; ++e) {
              const int64_t at = (col + e) * p.saved.row_stride + row * p.saved.col_stride;
              saved[e] = e < exist ? saved_at<T>(p.saved.data, p.saved_is_mask, at) : 0.0f;
            }
            activation_gradient(p.act, v, saved);
          }
#pragma unroll
          for (int e = 0; e < kPack<T>; ++e) row_sum[e] += sums_rows && e < exist ? v[e] : 0.0f;
        });
      } else {
        Traits::A::load_plain(stage, a, i0, k0);
      }
      if (b.asynchronous)
        walk_b.load(stage + Traits::A::kBytes);
      else
        Traits::B::load_plain(stage + Traits::A::kBytes, b, j0, k0);
    });
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages are free, and their memory is used again below

  if constexpr (!Traits::kAAlongK) {
    if (sums_rows) store_row_sums<Traits>(p, i0, shared, row_sum);
  }
  auto* strip = reinterpret_cast<float*>(shared + warp * Traits::Strip::kBytes);
  store_tile<Traits>(p, i0 + warp_m * Traits::kWarpM, j0 + warp_n * Traits::kWarpN, strip, acc);
}

}  // namespace dlk::cuda
