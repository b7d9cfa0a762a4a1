// A chain of narrow layers with everything it reuses in shared memory. Forward: all weights; a warp takes 16 rows of x
// through every layer. Backward: weights and the sums of their gradients; a block takes some rows of grad_y down through
// the layers and reads every saved activation once, as the mask of its layer and as the input of the next.
//
// What one layer hands to the next is rounded as a tensor would be. Sums are f32 in one fixed order, nothing is atomic.
#pragma once

#include "warp_tile.cuh"

namespace dlk::cuda {

constexpr int kChainLayers = 16;
constexpr int kChainFeatures = 128;
constexpr int kStrip = 16;  // rows of a warp tile
constexpr int kChainThreads = 512;

// One launch: layers begin ... end of a chain. Kernel parameters, hence values and no pointers to the host.
struct ChainPass {
  ChainLayer layer[kChainLayers];
  const void* saved[kChainLayers];  // h or z, what the gradient of the layer reads; nullptr for the identity
  int64_t rows;
  int begin, end;
  int pitch;       // of the rows in shared memory: that of the widest of these layers
  View x;          // input of layer 0
  View incoming;   // backward: grad_y, or dz of layer end - 1 where `masked`
  bool masked;     // the gradient that comes went through act' already
  void* outgoing;  // backward: dz of layer begin - 1, or dx; or nullptr
  int block_rows;  // backward: rows of a block at a time
  int slices;
  float* partials[kChainLayers];  // [slices, n, k] of dweight, behind it [slices, n] of dbias

  DLK_HD View input(int l) const { return l > 0 ? View{layer[l - 1].h, layer[l].k, 1} : x; }
};

template <class T>
DLK_HD int weight_rows(int n) {
  return round_up(n, kPadding<T>);
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// Of a layer: its weight, then its bias in f32, zeros where it has none.
template <class T>
DLK_HD int forward_bytes(int n, int k) {
  return weight_rows<T>(n) * (pitch_of<T>(k) * static_cast<int>(sizeof(T)) + static_cast<int>(sizeof(float)));
}
template <class T>
DLK_HD int strip_bytes(int pitch) {
  return kStrip * pitch * static_cast<int>(sizeof(T));
}

// One layer for the 16 rows of `strip`, in place. Every lane of the warp may read the strip before and after it.
template <class T, int kUnits>
DLK_DEVICE void forward_layer(const ChainLayer& layer, const unsigned char* shared, T* strip, int pitch, int64_t i0,
                              int rows) {
  using Tile = WarpTile<T, kUnits, true, true>;
  using O = Ops<float>;
  const int n = static_cast<int>(layer.n), k = static_cast<int>(layer.k), units = Tile::units(n);
  const T* weight = reinterpret_cast<const T*>(shared);
  const auto* bias = reinterpret_cast<const float*>(weight + weight_rows<T>(n) * pitch_of<T>(k));
  float acc[kUnits][4] = {};
  Tile::multiply(strip, pitch, weight, pitch_of<T>(k), ceil_div(k, Tile::kStep), units, acc);
  Tile::each(units, acc, [&](float& v, int, int col) { v += bias[col]; });
  __syncwarp();
  if (layer.z) {
    Tile::store(strip, pitch, kStrip, n, units, acc);
    __syncwarp();
    store_rows(this_warp(), layer.z, i0, rows, n, strip, pitch);
    __syncwarp();
  }
  with_activation(layer.act.kind, [&](auto act) {
    Tile::each(units, acc,
               [&](float& v, int, int) { v = decltype(act)::template value<O>(v, O::lit(layer.act.slope)); });
  });
  Tile::store(strip, pitch, kStrip, n, units, acc);
  __syncwarp();
  if (layer.h) store_rows(this_warp(), layer.h, i0, rows, n, strip, pitch);
}

// Every warp has two strips: while one goes through the layers, the rows of the next are on their way into the other.
template <class T, int kUnits>
__global__ void __launch_bounds__(kChainThreads, 1) chain_forward_kernel(const __grid_constant__ ChainPass p) {
  unsigned char* const shared = dynamic_shared();
  unsigned char* at = shared;
  for (int l = 0; l < p.end; ++l) {
    const int n = static_cast<int>(p.layer[l].n), k = static_cast<int>(p.layer[l].k), rows = weight_rows<T>(n);
    T* weight = reinterpret_cast<T*>(at);
    load_rows(this_block(), weight, pitch_of<T>(k), p.layer[l].weight, 0, n, k, rows);
    auto* bias = reinterpret_cast<float*>(weight + rows * pitch_of<T>(k));
    const T* from = static_cast<const T*>(p.layer[l].bias);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) bias[i] = from && i < n ? widen(from[i]) : 0.0f;
    at += forward_bytes<T>(n, k);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T* const strips = reinterpret_cast<T*>(at + warp * 2 * strip_bytes<T>(p.pitch));
  auto rows_of = [&](int64_t i0) { return static_cast<int>(min(int64_t{kStrip}, p.rows - i0)); };
  auto load = [&](int which, int64_t i0) {
    if (i0 < p.rows)
      load_rows(this_warp(), strips + which * kStrip * p.pitch, p.pitch, p.x, i0, rows_of(i0),
                static_cast<int>(p.layer[0].k), kStrip);
    cp_async_commit();  // also where there was nothing to load: groups are counted
  };
  const int step = gridDim.x * warps * kStrip;
  int which = 0;
  int64_t i0 = (int64_t{blockIdx.x} * warps + warp) * kStrip;
  load(which, i0);
#pragma unroll 1
  for (; i0 < p.rows; i0 += step, which ^= 1) {
    load(which ^ 1, i0 + step);
    cp_async_wait<1>();
    __syncwarp();
    const unsigned char* layer = shared;
#pragma unroll 1
    for (int l = 0; l < p.end; ++l) {
      forward_layer<T, kUnits>(p.layer[l], layer, strips + which * kStrip * p.pitch, p.pitch, i0, rows_of(i0));
      layer += forward_bytes<T>(static_cast<int>(p.layer[l].n), static_cast<int>(p.layer[l].k));
    }
    __syncwarp();  // before the strip is loaded again
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

constexpr int kBackwardUnits = 8;  // 64 columns: two warps for the rows of 128
constexpr int kSharers = 2;        // threads that share a column of dbias

// Of a layer: its weight, the sums of dweight as the lanes that own them hold them, and those of dbias.
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
  DLK_DEVICE static BackwardLayer at(unsigned char* shared, const ChainLayer& layer) {
    BackwardLayer s;
    s.n = static_cast<int>(layer.n), s.k = static_cast<int>(layer.k);
    s.weight = reinterpret_cast<T*>(shared);
    s.dweight = reinterpret_cast<Pack<float, 4>*>(s.weight + weight_rows<T>(s.n) * pitch_of<T>(s.k));
    s.dbias = reinterpret_cast<float*>(s.dweight + dweight_packs(s.n, s.k));
    return s;
  }
  DLK_DEVICE unsigned char* end() const { return reinterpret_cast<unsigned char*>(weight) + bytes(n, k); }

  // A warp owns tiles of 16 rows of dweight by 64 columns: f(row, column, its sums, how many units).
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

// dz = g · act'(saved) for `rows` rows of a block, in place of g.
template <class T>
DLK_DEVICE void mask_rows(const Activation& activation, T* g, const T* saved, int pitch, int rows, int cols) {
  using O = Ops<float>;
  constexpr int kChunk = kPack<T>;
  const int chunks = static_cast<int>(ceil_div(cols, kChunk));
  with_activation(activation.kind, [&](auto act) {
    for (int e = threadIdx.x; e < rows * chunks; e += blockDim.x) {
      const int col = e % chunks * kChunk, at = e / chunks * pitch + col;
      float gs[kChunk], s[kChunk];
      load<T>(g, at, gs);
      load<T>(saved, at, s);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        gs[i] = col + i < cols ? decltype(act)::template grad<O>(gs[i], s[i], O::lit(activation.slope)) : 0.0f;
      store<T>(g, at, gs);
    }
  });
}

// dweight += dzᵀ · input, over `rows` rows: sums of these rows first, then added to what is there.
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

// dbias += column sums of dz, likewise. A thread has every kSharers-th row of a column.
template <class T>
DLK_DEVICE void sum_columns(const BackwardLayer<T>& s, const T* dz, int pitch, int rows) {
  const int col = threadIdx.x % kChainFeatures, sharer = threadIdx.x / kChainFeatures;
  if (col >= s.n || sharer >= kSharers) return;
  float sum = 0;
  for (int row = sharer; row < rows; row += kSharers) sum += widen(dz[row * pitch + col]);
  s.dbias[sharer * s.n + col] += sum;
}

// (dz · weight) · act'(saved), rounded, in place of `saved`; without a `below` the product alone. Rows that a step of mma
// reads beyond the last one are zero.
template <class T>
DLK_DEVICE void dgrad_rows(const BackwardLayer<T>& s, const T* dz, T* saved, const Activation* below, int pitch,
                           int rows) {
  using Tile = typename BackwardLayer<T>::Dgrad;
  using O = Ops<float>;
  const int across = ceil_div(s.k, Tile::kColumns), tiles = ceil_div(rows, kStrip) * across;
  for (int tile = threadIdx.x / 32; tile < tiles; tile += blockDim.x / 32) {
    const int i = tile / across * kStrip, j = tile % across * Tile::kColumns;
    const int units = Tile::units(min(Tile::kColumns, s.k - j));
    float acc[kBackwardUnits][4] = {};
    Tile::multiply(dz + i * pitch, pitch, s.weight + j, pitch_of<T>(s.k), ceil_div(s.n, Tile::kStep), units, acc);
    T* to = saved + i * pitch + j;
    if (below) {
      with_activation(below->kind, [&](auto act) {
        Tile::each(units, acc, [&](float& v, int row, int col) {
          v = decltype(act)::template grad<O>(v, widen(to[row * pitch + col]), O::lit(below->slope));
        });
      });
    }
    Tile::store(to, pitch, rows - i, s.k - j, units, acc);
  }
}

// The sums of this slice to memory, where those of the slices are added up.
template <class T>
DLK_DEVICE void store_partials(const ChainPass& p, int l, const BackwardLayer<T>& s) {
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

// blockIdx.x is the slice of the rows. Three buffers of a block's rows change their roles from layer to layer: `dz`, the
// `input` of its layer, and one that is free, for what is read next.
template <class T>
__global__ void __launch_bounds__(kChainThreads, 1) chain_backward_kernel(const __grid_constant__ ChainPass p) {
  using Layer = BackwardLayer<T>;
  const int pitch = p.pitch, top = p.end - 1;
  T* dz = reinterpret_cast<T*>(dynamic_shared());
  T* input = dz + p.block_rows * pitch;
  T* free = input + p.block_rows * pitch;
  auto* const layers = reinterpret_cast<unsigned char*>(free + p.block_rows * pitch);

  auto has_dgrad = [&](int l) { return l > p.begin || p.outgoing; };
  // the mask that the dgrad of layer l applies, and whether that is the layer's input
  auto mask_of = [&](int l) { return l > 0 && has_dgrad(l) ? p.saved[l - 1] : nullptr; };
  auto masks_by_input = [&](int l) { return mask_of(l) && mask_of(l) == p.layer[l - 1].h; };
  auto needs_input = [&](int l) { return p.layer[l].dweight || masks_by_input(l); };

  unsigned char* at = layers;
  for (int l = top; l >= p.begin; --l) {
    const Layer s = Layer::at(at, p.layer[l]);
    if (has_dgrad(l))
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
    auto saved_by = [&](int l) { return View{p.saved[l], p.layer[l].n, 1}; };

    __syncthreads();  // the buffers have been read, by the block of rows before this one
    load_block(dz, p.incoming, p.layer[top].n);
    if (needs_input(top)) load_block(input, p.input(top), p.layer[top].k);
    if (!p.masked && p.saved[top]) {
      load_block(free, saved_by(top), p.layer[top].n);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      mask_rows(p.layer[top].act, dz, free, pitch, rows, static_cast<int>(p.layer[top].n));
    }

    at = layers;
    for (int l = top; l >= p.begin; --l) {
      const Layer s = Layer::at(at, p.layer[l]);
      at = s.end();
      const bool by_input = masks_by_input(l), by_z = mask_of(l) && !by_input;
      T* const gate = by_z ? free : input;
      T* const other = by_z ? input : free;
      const bool loads_next = l > p.begin && needs_input(l - 1);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();  // dz and input are there, and `free` is
      if (by_z) load_block(gate, saved_by(l - 1), s.k);
      if (!by_z && loads_next) load_block(other, p.input(l - 1), p.layer[l - 1].k);
      cp_async_commit();
      if (p.layer[l].dweight) wgrad_rows(s, dz, input, pitch, rows);
      if (p.layer[l].dbias) sum_columns(s, dz, pitch, rows);
      if (!has_dgrad(l)) break;
      if (by_z) cp_async_wait<0>();
      __syncthreads();  // the input has been read, and z is there
      if (by_z && loads_next) load_block(other, p.input(l - 1), p.layer[l - 1].k);
      dgrad_rows(s, dz, gate, mask_of(l) ? &p.layer[l - 1].act : nullptr, pitch, rows);
      if (l == p.begin) {
        __syncthreads();
        store_rows(this_block(), p.outgoing, i0, rows, s.k, gate, pitch);
      }
      free = dz, dz = gate, input = other;
    }
  }

  __syncthreads();
  at = layers;
  for (int l = top; l >= p.begin; --l) {
    const Layer s = Layer::at(at, p.layer[l]);
    store_partials(p, l, s);
    at = s.end();
  }
}

// Partials to gradients. blockIdx.z: twice the layer, and 1 more for dbias.
template <class T>
__global__ void __launch_bounds__(kSumOutputs* kSumSharers) chain_sum_kernel(const __grid_constant__ ChainPass p) {
  const ChainLayer& layer = p.layer[blockIdx.z / 2];
  const bool is_bias = blockIdx.z % 2;
  const int64_t parameters = layer.n * layer.k;
  void* out = is_bias ? layer.dbias : layer.dweight;
  if (out)
    sum_slices_block(p.partials[blockIdx.z / 2] + (is_bias ? p.slices * parameters : 0), p.slices,
                     is_bias ? layer.n : parameters, static_cast<T*>(out));
}

}  // namespace dlk::cuda
