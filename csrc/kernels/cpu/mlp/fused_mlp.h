// The fused MLP: a block of rows goes through several narrow layers while it is in L2, in forward and in backward.
//
//   forward   x block → h[1] → … → y             stores what backward needs on the way
//   backward  dz of the last layer → … → dx
//               wgrad    sums[l] += dzᵀ · h[l]                      dz in place, or packed as pairs of rows; h packed
//               dgrad    dz' = (dz · weight[l]) · act'(h[l])        act' and dbias in the epilogue
//
// Weights are packed once per thread. The rows of a block have the pitch of a packed A panel (kAStride), so the output
// that an epilogue stores in a block is the A operand of the next product without packing. Zeros follow it up to whole
// steps of the micro-kernel. One thread sums the parameter gradients of a slice of rows, block after block. How rows
// are cut is a function of the shape alone.
namespace dlk::cpu::DLK_ISA {

// The most features of a layer: one k block.
template <class E>
constexpr int64_t kFusedMlpFeatures = kKC<E> * E::kStep;
template <class E>
constexpr int64_t kPitch = kAStride<E> * E::kStep;  // of the rows of a block, in elements

// The most rows of a block, and the least where rows are cut in more than two blocks: a micro-tile of AMX has 32 rows.
constexpr int64_t kMostFusedMlpRows = 224, kLeastFusedMlpRows = kMR < 16 ? 24 : 96;

// Hands out pieces of one allocation. With a null base it only counts how large the allocation has to be.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = (T*)(base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return at;
  }
};

// Return the most features that any layer reads or writes.
inline int64_t fused_mlp_widest(const FusedMlp& p) {
  int64_t widest = p.layer[0].k;
  for (int l = 0; l < p.layers; ++l) widest = max(widest, p.layer[l].n);
  return widest;
}

// Return the rows of a block: whole micro-tiles, and so whole pairs of rows. Two blocks and the panels of wgrad take half of a
// 1 MiB L2. Threads and slices get equal shares where blocks are few: there are four of kLeastFusedMlpRows or more, or two.
template <class E>
int64_t fused_mlp_rows(const FusedMlp& p) {
  static_assert(kMR % 2 == 0);
  const int64_t fit = (int64_t{1} << 17) / (fused_mlp_widest(p) * sizeof(typename E::Packed));
  const int64_t most = max(min(fit, kMostFusedMlpRows) / kMR, 4) * kMR;
  const int64_t blocks = round_up(max(ceil_div(p.rows, most), min(p.rows / kLeastFusedMlpRows, 4)), 2);
  return min(round_up(ceil_div(max(p.rows, 1), max(blocks, 1)), kMR), most);
}

// The scratch of one thread.
template <class E>
struct FusedMlpBuffers {
  using Packed = typename E::Packed;
  using Cell = typename E::Cell;
  using A = typename E::Acc;

  Cell* weight[kFusedMlpLayers];    // the B panels of forward: weightᵀ
  Cell* weight_t[kFusedMlpLayers];  // the B panels of dgrad: weight
  Packed* block[2];                 // [rows, kPitch]: h or dz, from one layer to the next
  Cell* wgrad_a;                    // the A panels of wgrad: dz in pairs of rows; with E::kStep == 1 unused
  Cell* wgrad_b;                    // the B panels of wgrad: h
  Packed* row_buffer;               // rows on their way into a panel
  A* acc;                           // the accumulators of one micro-tile
  double* dbias[kFusedMlpLayers];

  static int64_t panels(int64_t k, int64_t n) {
    return round_up(n, E::kVL) * cells_of<E>(k) + ceil_div(n, E::kVL) * kPanelGap<E>;
  }
  // The cells of wgrad_a: panels of `rows` along k, in the order of pack_a_cols().
  static int64_t panels_of_dz(int64_t rows, int64_t n) {
    if (E::kDepth > 1) return round_up(n, kMR) * kAStride<E>;
    return cells_of<E>(rows) * round_up(n, kMR) + ceil_div(n, kMR) * kPanelGap<E> + kMR;
  }
  static FusedMlpBuffers carve(Arena& arena, const FusedMlp& p, int64_t rows, bool backward) {
    FusedMlpBuffers s{};
    const int64_t widest = fused_mlp_widest(p);
    for (Packed*& block : s.block) block = arena.take<Packed>(rows * kPitch<E> + kNV * E::kVL);
    for (int l = 0; l < p.layers; ++l) {
      const FusedMlpLayer& layer = p.layer[l];
      if (!backward) {
        s.weight[l] = arena.take<Cell>(panels(layer.k, layer.n));
        continue;
      }
      s.weight_t[l] = arena.take<Cell>(panels(layer.n, layer.k));
      s.dbias[l] = arena.take<double>(layer.n + E::kVL);
    }
    if (backward) {
      if (E::kStep > 1) s.wgrad_a = arena.take<Cell>(panels_of_dz(rows, widest));
      s.wgrad_b = arena.take<Cell>(panels(rows, widest));
    }
    s.row_buffer = arena.take<Packed>(3 * Buffers<E>::kRowBuffer * E::kStep);
    s.acc = arena.take<A>(kMR * kNV * E::kVL);
    return s;
  }
  static FusedMlpBuffers get(const FusedMlp& p, int64_t rows, bool backward) {
    Arena size{nullptr};
    carve(size, p, rows, backward);
    Arena arena{(char*)scratch(size.used)};
    FusedMlpBuffers s = carve(arena, p, rows, backward);
    for (int l = 0; l < p.layers; ++l) {
      const FusedMlpLayer& layer = p.layer[l];
      if (!backward) pack_b<E>(layer.weight.transposed(), s.weight[l], 0, layer.k, 0, layer.n, s.row_buffer);
      if (backward && (l > 0 || p.dx)) pack_b<E>(layer.weight, s.weight_t[l], 0, layer.n, 0, layer.k, s.row_buffer);
    }
    return s;
  }
};

// ---- epilogues of a micro-tile -------------------------------------------------------------------------------------

// Store n values in a row of a block, rounded as the tensor would hold them.
template <class E>
DLK_INLINE void store_block_row(typename E::Packed* to, typename E::V v, int64_t n) {
  if constexpr (!kIsSame<typename E::Packed, typename E::Elem>) v = rounded<typename E::Elem>(v);
  if (n >= E::kVL) return E::pack_store(to, v);
  E::pack_store_partial(to, v, n);
}

// The place of a micro-tile in the block.
struct MicroTile {
  int64_t i, j, rows, cols;
};

// Store act(acc + bias) in the block h and in rows i0.. of the layer's tensors.
template <class E, class Act>
void fused_mlp_value(const FusedMlpLayer& layer, const MicroTile& t, const typename E::Acc* acc, typename E::Packed* h,
                     int64_t i0) {
  using O = Ops<typename E::Acc>;
  using T = typename E::Elem;
  const auto slope = O::lit(layer.act.slope);
  // Read before the loops, as in epilogue.h.
  const int64_t pitch = layer.n, first = (i0 + t.i) * pitch + t.j, rows = t.rows;
  T *const z_out = layer.z ? (T*)layer.z + first : nullptr, *const h_out = layer.h ? (T*)layer.h + first : nullptr;
  typename E::Packed* const block = h ? h + t.i * kPitch<E> + t.j : nullptr;
  for (int64_t j = 0; j < t.cols; j += E::kVL) {
    const int64_t n = min(E::kVL, t.cols - j);
    const auto bias = layer.bias ? load_partial((const T*)layer.bias + t.j + j, 1, n) : O::lit(0);
    for (int64_t i = 0; i < rows; ++i) {
      const auto z = load(acc + i * kNV * E::kVL + j) + bias;
      const auto value = Act::template value<O>(z, slope);
      if (block) store_block_row<E>(block + i * kPitch<E> + j, value, n);
      if (z_out) store_partial(z_out + i * pitch + j, z, n);
      if (h_out) store_partial(h_out + i * pitch + j, value, n);
    }
  }
}

// Store dz = g · act'(saved), and add its columns to sum. g, [t.rows, ld], holds the sums of a micro-tile, or is a
// block, which may be dz itself. `saved` is rows i0.. of the layer's h or z.
template <class E, class Act, class G>
void fused_mlp_grad(const FusedMlpLayer& layer, const MicroTile& t, const G* g, int64_t ld, int64_t i0,
                    typename E::Packed* dz, double* sum) {
  using O = Ops<typename E::Acc>;
  const auto slope = O::lit(layer.act.slope);
  const int64_t pitch = layer.n, rows = t.rows;
  const auto* saved = (const typename E::Elem*)(Act::saves_output ? layer.h : layer.z) + (i0 + t.i) * pitch + t.j;
  typename E::Packed* const block = dz + t.i * kPitch<E> + t.j;
  for (int64_t j = 0; j < t.cols; j += E::kVL) {
    const int64_t n = min(E::kVL, t.cols - j);
    typename E::V total{};  // of the rows of a micro-tile; micro-tiles are added in f64
    for (int64_t i = 0; i < rows; ++i) {
      auto d = load(g + i * ld + j);
      if constexpr (!kIsSame<Act, Identity>)  // the identity saves nothing
        d = Act::template grad<O>(d, load_partial(saved + i * pitch + j, 1, n), slope);
      store_block_row<E>(block + i * kPitch<E> + j, d, n);
      total += d;
    }
    typename E::Acc lanes[E::kVL];
    store(lanes, total);
    for (int64_t c = 0; c < E::kVL; ++c) sum[t.j + j + c] += lanes[c];
  }
}

template <class E>
using FusedMlpValueFn = void (*)(const FusedMlpLayer&, const MicroTile&, const typename E::Acc*, typename E::Packed*,
                                 int64_t);
template <class E>
FusedMlpValueFn<E> fused_mlp_value_of(Act kind) {
  return with_activation(kind, [](auto act) -> FusedMlpValueFn<E> { return &fused_mlp_value<E, decltype(act)>; });
}

template <class E, class G>
using FusedMlpGradFn = void (*)(const FusedMlpLayer&, const MicroTile&, const G*, int64_t, int64_t, typename E::Packed*,
                                double*);
template <class E, class G>
FusedMlpGradFn<E, G> fused_mlp_grad_of(Act kind) {
  return with_activation(kind, [](auto act) -> FusedMlpGradFn<E, G> { return &fused_mlp_grad<E, decltype(act), G>; });
}

// ---- the products --------------------------------------------------------------------------------------------------

// Compute block · panels, and call out(tile) for every micro-tile. Its sums are in acc then, in rows of kNV registers. Where there
// is a to_c, it computes whole micro-tiles to whole(i, j) instead.
template <class E, class Out, class Whole>
DLK_INLINE void fused_mlp_product(const typename E::Packed* a, const typename E::Cell* b, int64_t rows, int64_t cols,
                                  int64_t k, typename E::Acc* acc, Out&& out, UkernelToC<E> to_c, Whole&& whole) {
  constexpr int64_t nr = kNV * E::kVL;
  const int64_t cells = cells_of<E>(k), padded = round_up(cols, E::kVL);
  const auto uk_whole = ukernel_for<E, kRowMajor>(kMR, kNV);
  for (int64_t i = 0; i < rows; i += kMR) {
    const int64_t r = min(kMR, rows - i);
    const auto* panel_a = (const typename E::Cell*)(a + i * kPitch<E>);
    for (int64_t j = 0; j < padded; j += nr) {
      const int64_t width = min(nr, padded - j);
      const auto* panel_b = b + panel_at<E>(j, nr, cells);
      if (to_c && r == kMR && j + nr <= cols) {
        to_c(cells, panel_a, panel_b, nr, nullptr, false, nullptr, whole(i, j));
        continue;
      }
      const auto uk = r == kMR && width == nr ? uk_whole : ukernel_for<E, kRowMajor>(r, width / E::kVL);
      uk(cells, panel_a, panel_b, width, acc, nr, false, nullptr);
      out(MicroTile{i, j, r, min(width, cols - j)});
    }
  }
}

// Put zeros behind the n columns of a block, up to a whole step of the micro-kernel.
template <class E>
void fused_mlp_pad(typename E::Packed* block, int64_t rows, int64_t n) {
  const int64_t padded = cells_of<E>(n) * E::kStep;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = n; j < padded; ++j) block[i * kPitch<E> + j] = {};
}

// Rows of a block can be written from registers, rounded like those of a tensor.
template <class E>
constexpr bool kBlockIsTensor = kIsSame<typename E::Packed, typename E::Elem>;

// A layer's forward: rows i0.. of act(block · panels + bias), to the layer's tensors and, unless it is nullptr, to `to`.
template <class E>
void fused_mlp_layer_forward(const FusedMlpLayer& layer, const typename E::Packed* block,
                             const typename E::Cell* panels, int64_t i0, int64_t rows, typename E::Acc* acc,
                             typename E::Packed* to) {
  using T = typename E::Elem;
  const auto value = fused_mlp_value_of<E>(layer.act.kind);
  const auto out = [&](const MicroTile& t) { value(layer, t, acc, to, i0); };
  const auto whole = [&](int64_t i, int64_t j) {
    TileOfC<T> tile{};
    if constexpr (kBlockIsTensor<E>) {
      tile.c = to ? to + i * kPitch<E> + j : nullptr, tile.pitch = kPitch<E>;
      if (layer.bias) tile.bias = (const T*)layer.bias + j;
      if (layer.h) {
        tile.copy = tile.c, tile.copy_pitch = tile.pitch;
        tile.c = (T*)layer.h + (i0 + i) * layer.n + j, tile.pitch = layer.n;
      }
    }
    return tile;
  };
  const auto to_y = kBlockIsTensor<E> && !layer.z ? UkernelsToC<E>::to_y(layer.act.kind).plain : nullptr;
  fused_mlp_product<E>(block, panels, rows, layer.n, layer.k, acc, out, to_y, whole);
  if (to) fused_mlp_pad<E>(to, rows, layer.n);
}

// A layer's dgrad: dz of the layer below, in the block `to`, and its columns added to dbias.
template <class E>
void fused_mlp_layer_dgrad(const FusedMlpLayer& layer, const FusedMlpLayer& below, const typename E::Packed* dz,
                           const typename E::Cell* panels, int64_t i0, int64_t rows, typename E::Acc* acc,
                           typename E::Packed* to, double* dbias) {
  using T = typename E::Elem;
  const auto grad = fused_mlp_grad_of<E, typename E::Acc>(below.act.kind);
  const auto out = [&](const MicroTile& t) { grad(below, t, acc, kNV * E::kVL, i0, to, dbias); };
  const auto whole = [&](int64_t i, int64_t j) {
    TileOfC<T> tile{};
    if constexpr (kBlockIsTensor<E>) {
      tile.c = to + i * kPitch<E> + j, tile.pitch = kPitch<E>;
      tile.below_saved = (const T*)below.h + (i0 + i) * below.n + j, tile.below_pitch = below.n;
      tile.column_sums = dbias + j;
    }
    return tile;
  };
  const auto to_dz = kBlockIsTensor<E> ? UkernelsToC<E>::to_dz(below.act.kind).plain : nullptr;
  fused_mlp_product<E>(dz, panels, rows, layer.k, layer.n, acc, out, to_dz, whole);
  fused_mlp_pad<E>(to, rows, below.n);
}

// sums = the sums of a micro-tile, or sums += them with `add`.
template <class E>
void fused_mlp_add_sums(const typename E::Acc* tile, typename E::Acc* sums, int64_t pitch, int64_t rows, int64_t cols,
                        bool add) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += E::kVL) {
      const auto v = load(tile + i * kNV * E::kVL + j);
      store(sums + i * pitch + j, add ? load(sums + i * pitch + j) + v : v);
    }
}

// sums[n, k] = dzᵀ · h, or sums += dzᵀ · h with `add`. h is rows i0.. of the layer's input; the rows of sums have a
// pitch.
template <class E>
void fused_mlp_wgrad(const FusedMlpBuffers<E>& s, const typename E::Packed* dz, const View& h, int64_t i0, int64_t rows,
                     const FusedMlpLayer& layer, typename E::Acc* sums, bool add) {
  constexpr int64_t nr = kNV * E::kVL;
  constexpr bool in_place = E::kStep == 1;
  const int64_t pitch = fused_mlp_pitch(layer.k), padded = round_up(layer.k, E::kVL), cells = cells_of<E>(rows);
  if constexpr (!in_place)
    pack_a_cols<E>(RowSource<E>::of({dz, 1, kPitch<E>}, View{}, {}), s.wgrad_a, 0, layer.n, 0, rows, s.row_buffer,
                   nullptr);
  pack_b<E>(h, s.wgrad_b, i0, rows, 0, layer.k, s.row_buffer);
  for (int64_t j = 0; j < padded; j += nr) {
    const int64_t width = min(nr, padded - j);
    for (int64_t i = 0; i < layer.n; i += kMR) {
      const int64_t r = min(kMR, layer.n - i);
      const auto uk = ukernel_for<E, in_place ? kInPlace : kKMajor>(r, width / E::kVL);
      auto* const to = sums + i * pitch + j;
      if constexpr (E::kDepth > 1) {  // one k block; a tile register that is not full is stored whole, past these sums
        static_assert(kMostFusedMlpRows <= kKC<E> * E::kStep);
        const bool full = r % E::kDepth == 0;
        uk(cells, s.wgrad_a + i * kAStride<E>, s.wgrad_b + panel_at<E>(j, nr, cells), width, full ? to : s.acc,
           full ? pitch : nr, full && add, nullptr);
        if (!full) fused_mlp_add_sums<E>(s.acc, to, pitch, r, width, add);
      } else {
        for (int64_t q = 0; q < cells; q += kKC<E>) {
          const typename E::Cell* a;
          if constexpr (in_place)
            a = dz + q * kPitch<E> + i;
          else
            a = s.wgrad_a + panel_at<E>(i, kMR, cells) + q * kMR;
          uk(min(kKC<E>, cells - q), a, s.wgrad_b + panel_at<E>(j, nr, cells) + q * width, width, to, pitch,
             add || q > 0, nullptr);
        }
      }
    }
  }
}

// ---- a block of rows -----------------------------------------------------------------------------------------------

// Copy rows i0.. of a matrix to a block.
template <class E>
void fused_mlp_load(const View& from, int64_t i0, int64_t rows, int64_t cols, typename E::Packed* block) {
  pack_a_rows<E>(RowSource<E>::of(from, View{}, {}), (typename E::Cell*)block, i0, rows, 0, cols);
}

// Take one block of rows through all layers.
template <class E>
void fused_mlp_block_forward(const FusedMlp& p, const FusedMlpBuffers<E>& s, int64_t i0, int64_t rows) {
  auto *h = s.block[0], *next = s.block[1];
  fused_mlp_load<E>(p.x, i0, rows, p.layer[0].k, h);
  for (int l = 0; l < p.layers; ++l) {
    const FusedMlpLayer& layer = p.layer[l];
    auto* out = l + 1 < p.layers ? next : nullptr;
    fused_mlp_layer_forward<E>(layer, h, s.weight[l], i0, rows, s.acc, out);
    next = h, h = out;
  }
}

// Take one block of rows back through all layers. `sums` is where the gradients of the last layer are summed in
// partials; `first`: the sums are written, not added to.
template <class E>
void fused_mlp_block_backward(const FusedMlp& p, FusedMlpBuffers<E>& s, int64_t i0, int64_t rows, typename E::Acc* sums,
                              bool first) {
  using Packed = typename E::Packed;
  const int last = p.layers - 1;
  auto *dz = s.block[0], *next = s.block[1];
  fused_mlp_load<E>(p.grad_y, i0, rows, p.layer[last].n, dz);
  const auto top = fused_mlp_grad_of<E, Packed>(p.layer[last].act.kind);
  for (int64_t i = 0; i < rows; i += kMR)
    top(p.layer[last], {i, 0, min(kMR, rows - i), p.layer[last].n}, dz + i * kPitch<E>, kPitch<E>, i0, dz,
        s.dbias[last]);
  fused_mlp_pad<E>(dz, rows, p.layer[last].n);
  for (int l = last; l >= 0; --l) {
    const FusedMlpLayer& layer = p.layer[l];
    const View input = l > 0 ? contiguous_view(layer.k, p.layer[l - 1].h) : p.x;
    if (layer.dweight) fused_mlp_wgrad<E>(s, dz, input, i0, rows, layer, sums, !first);
    if (l > 0) {
      const FusedMlpLayer& below = p.layer[l - 1];
      sums -= below.n * fused_mlp_pitch(below.k) + fused_mlp_pitch(below.n);
      fused_mlp_layer_dgrad<E>(layer, below, dz, s.weight_t[l], i0, rows, s.acc, next, s.dbias[l - 1]);
      auto* swap = dz;
      dz = next, next = swap;
    } else if (p.dx) {
      FusedMlpLayer x{};  // dx, written like the output of a layer without activation
      x.n = layer.k, x.k = layer.n, x.h = p.dx;
      fused_mlp_layer_forward<E>(x, dz, s.weight_t[0], i0, rows, s.acc, nullptr);
    }
  }
}

// ---- the calls -----------------------------------------------------------------------------------------------------

template <class E>
void fused_mlp_forward_with(const FusedMlp& p, const Parallel& parallel) {
  const int64_t rows = fused_mlp_rows<E>(p);
  parallel.run(ceil_div(p.rows, rows), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const FusedMlp*)context;
    const int64_t rows = fused_mlp_rows<E>(p);
    const auto s = FusedMlpBuffers<E>::get(p, rows, false);
    [[maybe_unused]] const typename E::Scope scope;
    for (int64_t block = begin; block < end; ++block)
      fused_mlp_block_forward<E>(p, s, block * rows, min(rows, p.rows - block * rows));
  });
}

// Add the slices of parameter gradients. A task is a row of some dweight, or all of a dbias behind the rows of its layer.
template <class T>
void fused_mlp_sum(const FusedMlp& p, int64_t begin, int64_t end) {
  const int64_t parameters = fused_mlp_parameters(p);
  const auto* sums = (const Acc<T>*)p.partials;
  for (int l = 0; l < p.layers; ++l) {
    const FusedMlpLayer& layer = p.layer[l];
    const int64_t pitch = fused_mlp_pitch(layer.k);
    for (int64_t i = max(begin, 0); layer.dweight && i < min(end, layer.n); ++i)
      sum_slices<T>(sums + i * pitch, p.slices, parameters, (T*)layer.dweight + i * layer.k, 0, layer.k);
    sums += layer.n * pitch;
    if (layer.dbias && begin <= layer.n && layer.n < end)
      sum_slices<T>(sums, p.slices, parameters, (T*)layer.dbias, 0, layer.n);
    sums += fused_mlp_pitch(layer.n);
    begin -= layer.n + 1, end -= layer.n + 1;
  }
}

template <class E>
void fused_mlp_backward_with(const FusedMlp& p, const Parallel& parallel) {
  using A = typename E::Acc;
  parallel.run(p.slices, &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const FusedMlp*)context;
    const int64_t rows = fused_mlp_rows<E>(p), blocks = ceil_div(p.rows, rows);
    auto s = FusedMlpBuffers<E>::get(p, rows, true);
    [[maybe_unused]] const typename E::Scope scope;
    const int64_t top = p.layers - 1, parameters = fused_mlp_parameters(p);
    const int64_t to_top =
        parameters - p.layer[top].n * fused_mlp_pitch(p.layer[top].k) - fused_mlp_pitch(p.layer[top].n);
    for (int64_t slice = begin; slice < end; ++slice) {
      A* sums = (A*)p.partials + slice * parameters;
      for (int l = 0; l < p.layers; ++l) __builtin_memset(s.dbias[l], 0, p.layer[l].n * sizeof(double));
      const int64_t first = slice * blocks / p.slices, last = (slice + 1) * blocks / p.slices;
      for (int64_t b = first; b < last; ++b)  // one or more: there are at least as many blocks as slices
        fused_mlp_block_backward<E>(p, s, b * rows, min(rows, p.rows - b * rows), sums + to_top, b == first);
      for (int l = 0; l < p.layers; ++l) {
        const FusedMlpLayer& layer = p.layer[l];
        sums += layer.n * fused_mlp_pitch(layer.k);
        for (int64_t i = 0; i < layer.n; ++i) sums[i] = (A)s.dbias[l][i];
        sums += fused_mlp_pitch(layer.n);
      }
    }
  });
  int64_t tasks = 0;
  for (int l = 0; l < p.layers; ++l) tasks += p.layer[l].n + 1;
  const auto sum = [](const void* p, int64_t begin, int64_t end) {
    fused_mlp_sum<typename E::Elem>(*(const FusedMlp*)p, begin, end);
  };
  // 2^16 accumulators are read in some 20 µs, and threads wake up in 5.
  if (p.slices * fused_mlp_parameters(p) < (1 << 16)) return sum(&p, 0, tasks);
  parallel.run(tasks, &p, sum);
}

template <class E>
constexpr FusedMlpKernels fused_mlp() {
  return {kFusedMlpFeatures<E>, kLeastFusedMlpRows, &fused_mlp_forward_with<E>, &fused_mlp_backward_with<E>};
}

}  // namespace dlk::cpu::DLK_ISA
