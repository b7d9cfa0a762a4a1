// The backward of several layers in one launch. Their weights and the sums of their parameter gradients are in shared
// memory. A block takes rows of grad_y back through the layers. It reads every saved activation once, for act' of its
// layer and as the input of the next one.
#pragma once

#include "kernels/cuda/mlp/fused_mlp.cuh"

namespace dlk::cuda {

constexpr int kBackwardThreads = 512;
constexpr int kBackwardUnits = 8;  // 64 columns, so that two warps have the rows of 128 columns
constexpr int kSharers = 2;        // threads that share a column of dbias

// One layer in shared memory: its weight, the sums of dweight in the order of the lanes that own them, and the sums of
// dbias.
template <class T>
struct BackwardLayer {
  using Wgrad = WarpTile<T, kBackwardUnits, false, false>;  // dweight[n, k] = dzᵀ · input
  using Dgrad = WarpTile<T, kBackwardUnits, true, false>;   // dz · weight
  static constexpr int kColumns = Wgrad::kColumns;

  int n, k;
  T* weight;
  Pack<float, 4>* dweight;  // [ceil(n / 16), units of k, lane]
  float* dbias;             // [kSharers, n]

  DLK_HD static int dweight_packs(int n, int k) { return ceil_div(n, kStrip) * Wgrad::units(k) * 32; }
  DLK_HD static int bytes(int n, int k) {
    return weight_rows<T>(n) * pitch_of<T>(k) * static_cast<int>(sizeof(T)) + dweight_packs(n, k) * 16 +
           round_up(kSharers * n, 4) * static_cast<int>(sizeof(float));
  }
  DLK_DEVICE static BackwardLayer at(unsigned char* shared, const FusedMlpLayer& layer) {
    BackwardLayer s;
    s.n = static_cast<int>(layer.n), s.k = static_cast<int>(layer.k);
    s.weight = reinterpret_cast<T*>(shared);
    s.dweight = reinterpret_cast<Pack<float, 4>*>(s.weight + weight_rows<T>(s.n) * pitch_of<T>(s.k));
    s.dbias = reinterpret_cast<float*>(s.dweight + dweight_packs(s.n, s.k));
    return s;
  }
  DLK_DEVICE unsigned char* end() const { return reinterpret_cast<unsigned char*>(weight) + bytes(n, k); }

  // Call f(row, column, sums, units) for every tile of dweight that this warp owns; a tile is 16 rows by 64 columns.
  template <class F>
  DLK_DEVICE void each_wgrad(F&& f) const {
    const int across = ceil_div(k, kColumns), tiles = ceil_div(n, kStrip) * across;
    for (int tile = threadIdx.x / 32; tile < tiles; tile += blockDim.x / 32) {
      const int i = tile / across * kStrip, j = tile % across * kColumns;
      f(i, j, dweight + (i / kStrip * Wgrad::units(k) + Wgrad::units(j)) * 32 + threadIdx.x % 32,
        Wgrad::units(min(kColumns, k - j)));
    }
  }
};

// dweight += dzᵀ · input over `rows` rows. These rows are summed first, and their sum is added.
template <class T>
DLK_DEVICE void wgrad_rows(const BackwardLayer<T>& s, const T* dz, const T* input, int pitch, int rows) {
  using Tile = typename BackwardLayer<T>::Wgrad;
  s.each_wgrad([&](int i, int j, Pack<float, 4>* sums, int units) {
    float acc[kBackwardUnits][4] = {};
    Tile::multiply(dz + i, pitch, input + j, pitch, ceil_div(rows, Tile::kStep), units, acc);
#pragma unroll
    for (int q = 0; q < kBackwardUnits; ++q) {
      if (q >= units) continue;
      Pack<float, 4> sum = sums[q * 32];
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.at[e] += acc[q][e];
      sums[q * 32] = sum;
    }
  });
}

// dbias += the column sums of dz over `rows` rows, likewise. A thread has every kSharers-th row of a column.
template <class T>
DLK_DEVICE void sum_columns(const BackwardLayer<T>& s, const T* dz, int pitch, int rows) {
  const int col = threadIdx.x % kFusedMlpFeatures, sharer = threadIdx.x / kFusedMlpFeatures;
  if (col >= s.n || sharer >= kSharers) return;
  float sum = 0;
  for (int row = sharer; row < rows; row += kSharers) sum += widen(dz[row * pitch + col]);
  s.dbias[sharer * s.n + col] += sum;
}

// Store the sums of this slice. fused_mlp_sum_kernel adds up the slices.
template <class T>
DLK_DEVICE void store_partials(const FusedMlpPass& p, int l, const BackwardLayer<T>& s) {
  using Tile = typename BackwardLayer<T>::Wgrad;
  const int slice = blockIdx.x, parameters = s.n * s.k;
  if (p.layer[l].dweight) {
    float* to = p.partials[l] + int64_t{slice} * parameters;
    s.each_wgrad([&](int i, int j, const Pack<float, 4>* sums, int units) {
#pragma unroll 1
      for (int q = 0; q < units; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = i + Tile::row(q, e), col = j + Tile::col(q, e);
          if (row < s.n && col < s.k) to[row * s.k + col] = sums[q * 32].at[e];
        }
      }
    });
  }
  if (p.layer[l].dbias) {
    float* to = p.partials[l] + int64_t{p.slices} * parameters + int64_t{slice} * s.n;
    for (int i = threadIdx.x; i < s.n; i += blockDim.x) {
      float sum = 0;
      for (int sharer = 0; sharer < kSharers; ++sharer) sum += s.dbias[sharer * s.n + i];
      to[i] = sum;
    }
  }
}

// blockIdx.x is the slice of the rows. Three buffers of rows change their roles from layer to layer: `dz`, the `input`
// of its layer, and one that is free for what is read next.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    fused_mlp_backward_kernel(const __grid_constant__ FusedMlpPass p) {
  using Layer = BackwardLayer<T>;
  const int pitch = p.pitch, top = p.end - 1;
  T* dz = reinterpret_cast<T*>(dynamic_shared());
  T* input = dz + p.block_rows * pitch;
  T* free = input + p.block_rows * pitch;
  auto* const layers = reinterpret_cast<unsigned char*>(free + p.block_rows * pitch);

  unsigned char* at = layers;
  for (int l = top; l >= p.begin; --l) {
    const Layer s = Layer::at(at, p.layer[l]);
    if (p.has_dgrad(l))
      load_rows(this_block(), s.weight, pitch_of<T>(s.k), p.layer[l].weight, 0, s.n, s.k, weight_rows<T>(s.n));
    at = s.end();
    for (auto* sums = reinterpret_cast<float*>(s.dweight) + threadIdx.x; sums < reinterpret_cast<float*>(at);
         sums += blockDim.x)
      *sums = 0;
  }

  const int64_t blocks = ceil_div(p.rows, p.block_rows);
  const int64_t last = (blockIdx.x + 1) * blocks / p.slices;
  for (int64_t block = blockIdx.x * blocks / p.slices; block < last; ++block) {
    const int64_t i0 = block * p.block_rows;
    const int rows = static_cast<int>(min(int64_t{p.block_rows}, p.rows - i0));
    auto load_block = [&](T* to, const View& from, int64_t cols) {
      load_rows(this_block(), to, pitch, from, i0, rows, static_cast<int>(cols), round_up(rows, kStrip));
    };
    auto saved_by = [&](int l) { return contiguous_view(p.layer[l].n, p.saved[l]); };

    __syncthreads();  // the block of rows before this one has been read, so the buffers are free
    load_block(dz, p.incoming, p.layer[top].n);
    if (p.needs_input(top)) load_block(input, p.input(top), p.layer[top].k);
    if (!p.incoming_is_dz && p.saved[top]) {
      load_block(free, saved_by(top), p.layer[top].n);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      make_dz_rows<false>(p.layer[top].act, dz, free, pitch, rows, static_cast<int>(p.layer[top].n));
    }

    at = layers;
    for (int l = top; l >= p.begin; --l) {
      const Layer s = Layer::at(at, p.layer[l]);
      at = s.end();
      const bool by_input = p.saved_below_is_input(l), reads_z = p.saved_below(l) && !by_input;
      T* const below_saved = reads_z ? free : input;
      T* const next_input = reads_z ? input : free;
      const bool loads_next = l > p.begin && p.needs_input(l - 1);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();  // dz and input are loaded, and `free` is free
      if (reads_z) load_block(below_saved, saved_by(l - 1), s.k);
      if (!reads_z && loads_next) load_block(next_input, p.input(l - 1), p.layer[l - 1].k);
      cp_async_commit();
      if (p.layer[l].dweight) wgrad_rows(s, dz, input, pitch, rows);
      if (p.layer[l].dbias) sum_columns(s, dz, pitch, rows);
      if (!p.has_dgrad(l)) break;
      if (reads_z) cp_async_wait<0>();
      __syncthreads();  // the input has been read, and z is loaded
      if (reads_z && loads_next) load_block(next_input, p.input(l - 1), p.layer[l - 1].k);
      dgrad_rows<typename Layer::Dgrad>(s.weight, s.n, s.k, dz, below_saved,
                                        p.saved_below(l) ? &p.layer[l - 1].act : nullptr, below_saved, pitch, rows,
                                        [](int, int) {});
      if (l == p.begin) {
        __syncthreads();
        store_rows(this_block(), p.outgoing, i0, rows, s.k, below_saved, pitch);
      }
      free = dz, dz = below_saved, input = next_input;
    }
  }

  cp_async_commit();
  cp_async_wait<0>();  // no copy is under way when the block ends, also if it had no rows
  __syncthreads();
  at = layers;
  for (int l = top; l >= p.begin; --l) {
    const Layer s = Layer::at(at, p.layer[l]);
    store_partials(p, l, s);
    at = s.end();
  }
}

}  // namespace dlk::cuda
