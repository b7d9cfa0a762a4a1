// The backward of one layer in one launch: dx, dweight and dbias from one read of its gradient, its saved tensor and
// its input.
//
// The weight is in shared memory, and the sums of dweight and dbias are in registers until the block ends. Blocks of
// rows pass through shared memory in `stages` stages: while one is multiplied, the next ones are loaded. There are two
// exceptions: 16-bit rows with an odd stride, and the case that this layer and the layer below both read a z, which
// share one buffer.
#pragma once

#include "kernels/cuda/mlp/fused_mlp.cuh"

namespace dlk::cuda {

constexpr int kLayerWarps = 8, kLayerThreads = kLayerWarps * 32;  // 255 registers a thread, of which 72 hold sums
constexpr int kLayerBuffers = 3;  // of a stage: the gradient, the input, and a saved tensor, which dx replaces

template <class T>
struct LayerBackward {
  using Wgrad = WarpTile<T, 8, false, false, 2>;  // dweight[n, k] = dzᵀ · input: 32 rows by 64 columns
  using Dgrad = WarpTile<T, 4, true, false, 2>;   // dz · weight: 32 rows by 32 columns
  static constexpr int kMostTiles = (kFusedMlpFeatures / Wgrad::kRows) * (kFusedMlpFeatures / Wgrad::kColumns);
  static_assert(kMostTiles == kLayerWarps, "every warp has a tile of the widest layer's dweight");

  DLK_HD static int tiles(int n, int k) { return ceil_div(n, Wgrad::kRows) * ceil_div(k, Wgrad::kColumns); }
  // Return how many warps share a tile of dweight. Each of them has a part of the rows of a block.
  DLK_HD static int sharers(int n, int k) { return kLayerWarps / tiles(n, k); }
  // Return the pitch of rows in shared memory. The warp tiles read 32 columns of dz at once.
  DLK_HD static int pitch(int features) { return pitch_of<T>(round_up(features, Wgrad::kRows)); }

  DLK_HD static int weight_elements(int n, int k) { return weight_rows<T>(n) * pitch_of<T>(k); }
  // The memory through which one sharer passes the sums of every tile to another: kSums + kRowSums packs of each lane.
  static constexpr int kSums = sizeof(typename Wgrad::Sums) / 16, kRowSums = sizeof(typename Wgrad::RowSums) / 16;
  DLK_HD static int exchange_bytes(int n, int k) {
    return sharers(n, k) > 1 ? tiles(n, k) * (kSums + kRowSums) * 512 : 0;
  }

  DLK_HD static int bytes(int n, int k, int rows, int stages) {
    const int staged = stages * kLayerBuffers * rows * pitch(max(n, k)) * static_cast<int>(sizeof(T));
    return weight_elements(n, k) * static_cast<int>(sizeof(T)) + max(staged, exchange_bytes(n, k));
  }
};

// Load the activation mask of rows i0 ... i0 + rows, of n features each, to shared memory without changing its layout.
// i0 is a multiple of 16, which aligns the source.
DLK_DEVICE void load_mask_rows(void* to, const void* mask, int64_t i0, int rows, int n) {
  const auto* from = static_cast<const unsigned char*>(mask) + i0 * n / kMaskBits;
  const int bytes = rows * n / kMaskBits;
  for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16)
    cp_async_16(static_cast<unsigned char*>(to) + at, from + at, min(16, bytes - at));
}

// blockIdx.x is the slice of the rows.
template <class T>
__global__ void __launch_bounds__(kLayerThreads, 1) layer_backward_kernel(const __grid_constant__ FusedMlpPass p) {
  using Layer = LayerBackward<T>;
  using Wgrad = typename Layer::Wgrad;
  const int l = p.begin, pitch = p.pitch, buffer = p.block_rows * pitch;
  const FusedMlpLayer& layer = p.layer[l];
  const int n = static_cast<int>(layer.n), k = static_cast<int>(layer.k);
  T* const weight = reinterpret_cast<T*>(dynamic_shared());
  T* const stages = weight + Layer::weight_elements(n, k);
  const int64_t blocks = ceil_div(p.rows, p.block_rows);
  const int64_t first = blockIdx.x * blocks / p.slices, last = (blockIdx.x + 1) * blocks / p.slices;

  // Two saved tensors that are no other operand: one for act' of this layer, and z of the layer below. They share a
  // buffer, so if both are needed, z is loaded after the first has been read.
  const bool applies_act = !p.incoming_is_dz && p.saved[l];
  const View z{p.saved_below_is_input(l) ? nullptr : p.saved_below(l), k, 1};

  auto rows_of = [&](int64_t block) {
    return static_cast<int>(min(int64_t{p.block_rows}, p.rows - block * p.block_rows));
  };
  auto stage_of = [&](int64_t block) {
    return stages + static_cast<int>(block - first) % p.stages * kLayerBuffers * buffer;
  };
  auto load_block = [&](T* to, const View& from, int64_t block, int cols) {
    const int rows = rows_of(block);
    load_rows(this_block(), to, pitch, from, block * p.block_rows, rows, cols, round_up(rows, Wgrad::kRows));
  };
  auto load_stage = [&](int64_t block) {
    if (block < last) {
      T* const stage = stage_of(block);
      load_block(stage, p.incoming, block, n);
      if (p.needs_input(l)) load_block(stage + buffer, p.input(l), block, k);
      if (applies_act && p.saved_is_mask)
        load_mask_rows(stage + 2 * buffer, p.saved[l], block * p.block_rows, rows_of(block), n);
      else if (applies_act)
        load_block(stage + 2 * buffer, View{p.saved[l], n, 1}, block, n);
      else if (z.data)
        load_block(stage + 2 * buffer, z, block, k);
    }
    cp_async_commit();  // also if there was nothing to load, because groups are counted
  };

  // The tile of dweight of this warp, and its part of the rows.
  const int tiles = Layer::tiles(n, k), across = ceil_div(k, Wgrad::kColumns), sharers = Layer::sharers(n, k);
  const int tile = threadIdx.x / 32 % tiles, sharer = threadIdx.x / 32 / tiles;
  const int i = tile / across * Wgrad::kRows, j = tile % across * Wgrad::kColumns;
  const int units = layer.dweight ? Wgrad::units(min(Wgrad::kColumns, k - j)) : 0;
  const bool sums = sharer < sharers && (layer.dweight || layer.dbias);
  const int share = round_up(ceil_div(p.block_rows, sharers), kStrip), share_begin = sharer * share;
  typename Wgrad::Sums dweight = {};
  typename Wgrad::RowSums dbias = {};

  if (p.outgoing) load_rows(this_block(), weight, pitch_of<T>(k), layer.weight, 0, n, k, weight_rows<T>(n));
  for (int stage = 0; stage + 1 < p.stages; ++stage) load_stage(first + stage);
#pragma unroll 1
  for (int64_t block = first; block < last; ++block) {
    const int rows = rows_of(block);
    T *const dz = stage_of(block), *const input = dz + buffer, *const saved_or_dx = input + buffer;
    if (p.stages > 2)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();  // these rows are loaded, and the rows before them have been read: their buffers are next
    load_stage(block + p.stages - 1);
    if (applies_act) {
      if constexpr (kHasMask<T, kPack<T>>) {
        if (p.saved_is_mask) make_dz_rows<true>(layer.act, dz, saved_or_dx, pitch, rows, n);
      }
      if (!p.saved_is_mask) make_dz_rows<false>(layer.act, dz, saved_or_dx, pitch, rows, n);
      __syncthreads();  // dz is made
      if (z.data) {
        load_block(saved_or_dx, z, block, k);
        cp_async_commit();
      }
    }
    const int steps = ceil_div(min(share, rows - share_begin), Wgrad::kStep);
    if (sums && steps > 0) {
      typename Wgrad::RowSums block_sums = {};  // each block is summed separately: fewer rounding errors in sequence
      Wgrad::multiply(dz + share_begin * pitch + i, pitch, input + share_begin * pitch + j, pitch, steps, units,
                      dweight, block_sums);
#pragma unroll
      for (int strip = 0; strip < Layer::kRowSums; ++strip) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dbias[strip][e] += block_sums[strip][e];
      }
    }
    if (!p.outgoing) continue;
    if (applies_act && z.data) {
      cp_async_wait<0>();
      __syncthreads();  // z is loaded
    }
    const T* below_saved = p.saved_below_is_input(l) ? input : saved_or_dx;
    dgrad_rows<typename Layer::Dgrad>(
        weight, n, k, dz, below_saved, p.saved_below(l) ? &p.layer[l - 1].act : nullptr, saved_or_dx, pitch, rows,
        [&](int row, int col) {
          using Dgrad = typename Layer::Dgrad;
          __syncwarp();
          T* const to = static_cast<T*>(p.outgoing) + (block * p.block_rows + row) * k + col;
          store_rows(this_warp(), to, k, min(Dgrad::kRows, rows - row), min(Dgrad::kColumns, k - col),
                     saved_or_dx + row * pitch + col, pitch);
        });
  }

  cp_async_wait<0>();  // no copy is under way when the block ends, also if it had no rows

  // Add the sums of the sharers, one after the other, to those of the first sharer.
  for (int from = 1; from < sharers; ++from) {
    auto* const exchange =
        reinterpret_cast<Pack<float, 4>*>(stages) + tile * (Layer::kSums + Layer::kRowSums) * 32 + threadIdx.x % 32;
    auto each = [&](auto&& f) {
#pragma unroll
      for (int q = 0; q < Layer::kSums; ++q) f(dweight[q], exchange[q * 32]);
#pragma unroll
      for (int q = 0; q < Layer::kRowSums; ++q) f(dbias[q], exchange[(Layer::kSums + q) * 32]);
    };
    __syncthreads();  // the exchange memory is free
    if (sums && sharer == from)
      each([](float (&sum)[4], Pack<float, 4>& to) {
#pragma unroll
        for (int e = 0; e < 4; ++e) to.at[e] = sum[e];
      });
    __syncthreads();  // the sums are in the exchange memory
    if (sums && sharer == 0)
      each([](float (&sum)[4], const Pack<float, 4>& more) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += more.at[e];
      });
  }

  if (!sums || sharer > 0) return;
  float* const to = p.partials[l] + int64_t{blockIdx.x} * n * k;
  Wgrad::each(units, dweight, [&](float sum, int row, int col) {
    if (i + row < n && j + col < k) to[(i + row) * k + j + col] = sum;
  });
  if (!layer.dbias || j > 0) return;
  float* const to_bias = p.partials[l] + int64_t{p.slices} * n * k + int64_t{blockIdx.x} * n;
#pragma unroll
  for (int strip = 0; strip < Layer::kRowSums; ++strip) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = i + Wgrad::sum_row(strip, e);
      if (Wgrad::owns_sum(e) && row < n) to_bias[row] = dbias[strip][e];
    }
  }
}

}  // namespace dlk::cuda
