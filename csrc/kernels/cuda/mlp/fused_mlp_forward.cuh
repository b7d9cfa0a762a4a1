// The forward of the fused MLP. All weights are in shared memory, and a warp takes 16 rows of x through every layer.
#pragma once

#include "kernels/cuda/mlp/fused_mlp.cuh"

namespace dlk::cuda {

constexpr int kForwardWarps = 16;  // the most warps of a block

// Return the shared memory of a layer: its weight, then its bias in f32, which is zeros if the layer has none.
template <class T>
DLK_HD int forward_bytes(int n, int k) {
  return weight_rows<T>(n) * (pitch_of<T>(k) * static_cast<int>(sizeof(T)) + static_cast<int>(sizeof(float)));
}
template <class T>
DLK_HD int strip_bytes(int pitch) {
  return kStrip * pitch * static_cast<int>(sizeof(T));
}

// Store the activation mask of a strip.
template <class T>
DLK_DEVICE void mask_strip(const FusedMlpLayer& layer, const T* strip, int pitch, int64_t i0, int rows) {
  for (RowWalk walk(this_warp(), static_cast<int>(layer.n) / kMaskBits); walk.row < rows; walk.next()) {
    float y[kMaskBits];
    load<T>(strip, walk.row * pitch + walk.piece * kMaskBits, y);
    store_mask_of<T>(layer.act.kind, layer.mask, (i0 + walk.row) * layer.n + walk.piece * kMaskBits, y);
  }
}

// Run one layer for the 16 rows of `strip`, in place. Before and after the call every lane of the warp may read the
// strip.
template <class T, int kUnits>
DLK_DEVICE void forward_layer(const FusedMlpLayer& layer, const unsigned char* shared, T* strip, int pitch, int64_t i0,
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
  auto with = [&](auto act) {
    Tile::each(units, acc,
               [&](float& v, int, int) { v = decltype(act)::template value<O>(v, O::lit(layer.act.slope)); });
  };
  if constexpr (sizeof(T) == 4)  // a call would need more registers than are left
    with_activation(layer.act.kind, with);
  else if (!with_comparison(layer.act.kind, with))
    Tile::each_unit(units, acc, [&](float (&v)[4], int) { activate_long(layer.act, v); });
  Tile::store(strip, pitch, kStrip, n, units, acc);
  __syncwarp();
  if (layer.h) store_rows(this_warp(), layer.h, i0, rows, n, strip, pitch);
  if constexpr (kHasMask<T, kPack<T>>) {
    if (layer.mask) mask_strip(layer, strip, pitch, i0, rows);
  }
}

// Every warp has two strips: while one goes through the layers, the other receives the next rows.
template <class T, int kUnits>
__global__ void __launch_bounds__(kForwardWarps * 32, 1)
    fused_mlp_forward_kernel(const __grid_constant__ FusedMlpPass p) {
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

  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T* const strips = reinterpret_cast<T*>(at + warp * 2 * strip_bytes<T>(p.pitch));
  auto rows_of = [&](int64_t i0) { return static_cast<int>(min(int64_t{kStrip}, p.rows - i0)); };
  auto load = [&](int which, int64_t i0) {
    if (i0 < p.rows)
      load_rows(this_warp(), strips + which * kStrip * p.pitch, p.pitch, p.x, i0, rows_of(i0),
                static_cast<int>(p.layer[0].k), kStrip);
    cp_async_commit();  // also if there was nothing to load, because groups are counted
  };
  const int step = gridDim.x * warps * kStrip;
  int which = 0;
  int64_t i0 = (int64_t{blockIdx.x} * warps + warp) * kStrip;
  cp_async_commit();
  load(which, i0);
  cp_async_wait<1>();
  __syncthreads();  // the weights are loaded
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

}  // namespace dlk::cuda
