// The fused MLP: narrow layers whose weights stay in shared memory. This file has the common parts of its kernels.
// fused_mlp_forward.cuh takes rows through all layers, fused_mlp_backward.cuh takes them back through several layers,
// and layer_backward.cuh is the backward of one layer.
//
// The output of a layer is rounded before the next layer reads it, as a tensor would be. Sums are f32 in one fixed
// order, and nothing is atomic.
#pragma once

#include "kernels/cuda/gemm/slices.cuh"
#include "kernels/cuda/gemm/warp_tile.cuh"

namespace dlk::cuda {

constexpr int kFusedMlpFeatures = 128;  // the most in_features and out_features of a layer

// The parameters of one launch: layers begin ... end of a fused MLP. Kernel parameters are values, not pointers to the
// host.
struct FusedMlpPass {
  FusedMlpLayer layer[kFusedMlpLayers];
  const void* saved[kFusedMlpLayers];  // h or z: what act' of the layer reads; nullptr for the identity
  bool saved_is_mask;                  // backward of one layer: `saved` is the activation mask of h
  int64_t rows;
  int begin, end;
  int pitch;            // of rows in shared memory: the pitch for the widest of these layers
  View x;               // the input of layer 0
  View incoming;        // backward: grad_y, or dz of layer end - 1 where `incoming_is_dz`
  bool incoming_is_dz;  // `incoming` is dz of layer end - 1
  void* outgoing;       // backward: dz of layer begin - 1, or dx; or nullptr
  int block_rows;       // backward: rows of a block
  int stages;           // layer_backward: how many blocks of rows are in shared memory
  int slices;
  float* partials[kFusedMlpLayers];  // [slices, n, k] of dweight, behind it [slices, n] of dbias

  DLK_HD View input(int l) const { return l > 0 ? contiguous_view(layer[l].k, layer[l - 1].h) : x; }

  // Return whether backward of layer l makes dz of the layer below, or dx.
  DLK_HD bool has_dgrad(int l) const { return l > begin || outgoing; }
  // Return what act' of the layer below reads, which dgrad of layer l multiplies by; or nullptr.
  DLK_HD const void* saved_below(int l) const { return l > 0 && has_dgrad(l) ? saved[l - 1] : nullptr; }
  // Return whether that is the input of layer l.
  DLK_HD bool saved_below_is_input(int l) const { return saved_below(l) && saved_below(l) == layer[l - 1].h; }
  DLK_HD bool needs_input(int l) const { return layer[l].dweight || saved_below_is_input(l); }
};

// Return the rows of a weight with n rows in shared memory.
template <class T>
DLK_HD int weight_rows(int n) {
  return round_up(n, kPadding<T>);
}

// ---- common parts of both backward kernels ------------------------------------------------------------------------

// Make dz = g · act'(saved) for `rows` rows of a block, in place of g. kBits: `saved` is the activation mask.
template <bool kBits, class T>
DLK_DEVICE void make_dz_rows(const Activation& activation, T* g, const T* saved, int pitch, int rows, int cols) {
  constexpr int kChunk = kPack<T>;
  const int chunks = static_cast<int>(ceil_div(cols, kChunk));
#pragma unroll 1
  for (RowWalk walk(this_block(), chunks); walk.row < rows; walk.next()) {
    const int col = walk.piece * kChunk, at = walk.row * pitch + col;
    float gs[kChunk], s[kChunk];
    load<T>(g, at, gs);
    if constexpr (kBits)
      load_mask<T>(saved, walk.row * cols + col, s);
    else
      load<T>(saved, at, s);
    activation_gradient(activation, gs, s);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) gs[i] = col + i < cols ? gs[i] : 0.0f;
    store<T>(g, at, gs);
  }
}

// out = (dz · weight) · act'(below_saved), rounded; without `below` the product alone. out may be the memory of
// below_saved. Shared memory has the rows that a step of mma reads beyond the last one. After each tile of the warp
// made(i, j) is called: its first row and column in out.
template <class Tile, class T, class F>
DLK_DEVICE void dgrad_rows(const T* weight, int n, int k, const T* dz, const T* below_saved, const Activation* below,
                           T* out, int pitch, int rows, F&& made) {
  using O = Ops<float>;
  const int across = ceil_div(k, Tile::kColumns), tiles = ceil_div(rows, Tile::kRows) * across;
  for (int tile = threadIdx.x / 32; tile < tiles; tile += blockDim.x / 32) {
    const int i = tile / across * Tile::kRows, j = tile % across * Tile::kColumns, at = i * pitch + j;
    const int units = Tile::units(min(Tile::kColumns, k - j));
    typename Tile::Sums acc = {};
    Tile::multiply(dz + i * pitch, pitch, weight + j, pitch_of<T>(k), ceil_div(n, Tile::kStep), units, acc);
    if (below) {
      // In the code of the kernel, because a call would need more registers than are left.
      with_activation(below->kind, [&](auto act) {
        Tile::each(units, acc, [&](float& v, int row, int col) {
          v = decltype(act)::template grad<O>(v, widen(below_saved[at + row * pitch + col]), O::lit(below->slope));
        });
      });
    }
    Tile::store(out + at, pitch, rows - i, k - j, units, acc);
    made(i, j);
  }
}

// Add up the slices of the parameter gradients. blockIdx.z is 2 · layer for dweight, 2 · layer + 1 for dbias.
template <class T>
__global__ void __launch_bounds__(kSumOutputs* kSumSharers)
    fused_mlp_sum_kernel(const __grid_constant__ FusedMlpPass p) {
  const FusedMlpLayer& layer = p.layer[blockIdx.z / 2];
  const bool is_bias = blockIdx.z % 2;
  const int64_t parameters = layer.n * layer.k;
  void* out = is_bias ? layer.dbias : layer.dweight;
  if (out)
    sum_slices_block(p.partials[blockIdx.z / 2] + (is_bias ? p.slices * parameters : 0), p.slices,
                     is_bias ? layer.n : parameters, static_cast<T*>(out));
}

}  // namespace dlk::cuda
