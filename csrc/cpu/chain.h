// A chain of narrow layers: a block of rows goes through all of them while it is in L2, forward and backward.
//
//   forward   x block → h[1] → … → y             what backward needs goes to memory on the way
//   backward  dz of the last layer → … → dx
//               wgrad    sums[l] += dzᵀ · h[l]                      float: both operands where they lie
//               dgrad    dz' = (dz · weight[l]) · act'(h[l])        mask and dbias in the epilogue
//
// Weights are packed once per thread. A block row has the pitch of a packed A panel (kAStride), so an activation that an
// epilogue stored is the next product's A operand as it is. The parameters' gradients of a slice of rows are summed by
// one thread, block after block; how rows are cut is a function of the shape alone.
namespace dlk::cpu::DLK_ISA {

template <class E>
constexpr int64_t kChainFeatures = kKC<E> * E::kStep;
template <class E>
constexpr int64_t kPitch = kAStride<E> * E::kStep;  // of a block row, in elements

// Pieces of one allocation; without one, how large it would be.
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

template <class E>
struct ChainBuffers {
  using Packed = typename E::Packed;
  using Cell = typename E::Cell;
  using A = typename E::Acc;

  Cell* weight[kChainLayers];    // forward's B: panels of weightᵀ
  Cell* weight_t[kChainLayers];  // dgrad's B: panels of weight
  Packed* h[kChainLayers + 1];   // inputs of the layers, and y: [rows, kPitch]
  Packed* z[kChainLayers];       // pre-activations, where act' reads them
  Packed* dz[2];
  Cell *wgrad_a, *wgrad_b;             // E::kStep > 1: pairs of rows have to be made
  Packed* run;                         // on their way into a panel
  A* acc;                              // a micro-tile
  ColumnSum<E> row_sum[kChainLayers];  // dbias

  static int64_t panels(int64_t k, int64_t n) {
    return round_up(n, E::kVL) * ceil_div(k, E::kStep) + ceil_div(n, E::kVL) * kPanelGap<E>;
  }
  static ChainBuffers carve(Arena& arena, const Chain& p, int64_t rows, bool backward) {
    ChainBuffers s{};
    int64_t widest = p.layer[0].k;
    auto block = [&] { return arena.take<Packed>(rows * kPitch<E> + kNV * E::kVL); };
    s.h[0] = block();
    for (int l = 0; l < p.layers; ++l) {
      const ChainLayer& layer = p.layer[l];
      widest = max(widest, layer.n);
      s.h[l + 1] = !backward && l > 0 ? s.h[l - 1] : block();  // forward needs two, in turn
      if (!backward) {
        s.weight[l] = arena.take<Cell>(panels(layer.k, layer.n));
        continue;
      }
      s.weight_t[l] = arena.take<Cell>(panels(layer.n, layer.k));
      if (!saves_output(layer.act.kind)) s.z[l] = block();
      s.row_sum[l].total = arena.take<double>(layer.n + E::kVL);
      s.row_sum[l].block = arena.take<A>(layer.n + E::kVL);
    }
    if (backward) {
      s.dz[0] = block(), s.dz[1] = block();
      if (E::kStep > 1) {
        const int64_t cells = ceil_div(rows, E::kStep);
        s.wgrad_a = arena.take<Cell>(cells * round_up(widest, kMR) + ceil_div(widest, kMR) * kPanelGap<E> + kMR);
        s.wgrad_b = arena.take<Cell>(panels(rows, widest));
      }
    }
    s.run = arena.take<Packed>(3 * Buffers<E>::kRun * E::kStep);
    s.acc = arena.take<A>(kMR * kNV * E::kVL);
    return s;
  }
  static ChainBuffers get(const Chain& p, int64_t rows, bool backward) {
    Arena size{nullptr};
    carve(size, p, rows, backward);
    Arena arena{(char*)scratch(size.used)};
    ChainBuffers s = carve(arena, p, rows, backward);
    for (int l = 0; l < p.layers; ++l) {
      const ChainLayer& layer = p.layer[l];
      if (!backward) pack_b<E>(layer.weight.transposed(), s.weight[l], 0, layer.k, 0, layer.n, s.run);
      if (backward && (l > 0 || p.dx)) pack_b<E>(layer.weight, s.weight_t[l], 0, layer.n, 0, layer.k, s.run);
    }
    return s;
  }
};

// Rows of a block: the blocks of all layers share half of a 1 MiB L2; whole micro-tiles, and pairs of rows.
template <class E>
int64_t chain_rows(const Chain& p, bool backward) {
  constexpr int64_t step = 2 * kMR;
  int64_t blocks = backward ? p.layers + 3 : 2;
  for (int l = 0; backward && l < p.layers; ++l) blocks += !saves_output(p.layer[l].act.kind);
  const int64_t fit = (int64_t{1} << 19) / (blocks * kPitch<E> * sizeof(typename E::Packed));
  return min(max(fit / step, 2), 8) * step;
}

// ---- what happens to a micro-tile ------------------------------------------------------------------------------------

// A value as the tensor would hold it.
template <class T>
DLK_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (kSame<T, Acc<T>>) {
    return v;
  } else {
    return from_bits(T{}, to_bits(T{}, v));
  }
}

// n values into a block row, as the tensor would hold them; behind the last one of an odd row a zero, because cells are pairs.
template <class E>
DLK_INLINE void put(typename E::Packed* to, typename E::V v, int64_t n) {
  if constexpr (!kSame<typename E::Packed, typename E::Elem>) v = rounded<typename E::Elem>(v);
  if (n >= E::kVL) return E::pack_store(to, v);
  E::pack_store_some(to, v, n);
  if (E::kStep == 2 && n % 2) to[n] = {};
}

struct MicroTile {
  int64_t i, j, rows, cols;  // in the block
};

// act(acc + bias) into the block h, and rows i0.. of the layer's tensors.
template <class E, class Act>
void chain_value(const ChainLayer& layer, const MicroTile& t, const typename E::Acc* acc, typename E::Packed* h,
                 int64_t i0) {
  using O = Ops<typename E::Acc>;
  using T = typename E::Elem;
  const auto slope = O::lit(layer.act.slope);
  for (int64_t j = 0; j < t.cols; j += E::kVL) {
    const int64_t n = min(E::kVL, t.cols - j);
    const auto bias = layer.bias ? load_some((const T*)layer.bias + t.j + j, 1, n) : O::lit(0);
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t at = (i0 + t.i + i) * layer.n + t.j + j;
      const auto z = load(acc + i * kNV * E::kVL + j) + bias;
      const auto value = Act::template value<O>(z, slope);
      if (h) put<E>(h + (t.i + i) * kPitch<E> + t.j + j, value, n);
      if (layer.z) store_some((T*)layer.z + at, z, n);
      if (layer.h) store_some((T*)layer.h + at, value, n);
    }
  }
}

// dz = g · act'(saved), and its column sums. g [t.rows, ld]: a micro-tile's sums, or a block, which may be dz itself.
template <class E, class Act, class G>
void chain_grad(const Activation& act, const MicroTile& t, const G* g, int64_t ld, const typename E::Packed* saved,
                typename E::Packed* dz, ColumnSum<E>& sum) {
  using O = Ops<typename E::Acc>;
  const auto slope = O::lit(act.slope);
  for (int64_t j = 0; j < t.cols; j += E::kVL) {
    const int64_t n = min(E::kVL, t.cols - j);
    auto total = load_some(sum.block + t.j + j, 1, n);
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t at = (t.i + i) * kPitch<E> + t.j + j;
      const auto d = Act::template grad<O>(load(g + i * ld + j), load(saved + at), slope);
      put<E>(dz + at, d, n);
      total += d;
    }
    store_some(sum.block + t.j + j, total, n);
  }
}

template <class E>
using ChainValueFn = void (*)(const ChainLayer&, const MicroTile&, const typename E::Acc*, typename E::Packed*,
                              int64_t);
template <class E>
ChainValueFn<E> chain_value_of(Act kind) {
  return with_activation(kind, [](auto act) -> ChainValueFn<E> { return &chain_value<E, decltype(act)>; });
}

template <class E, class G>
using ChainGradFn = void (*)(const Activation&, const MicroTile&, const G*, int64_t, const typename E::Packed*,
                             typename E::Packed*, ColumnSum<E>&);
template <class E, class G>
ChainGradFn<E, G> chain_grad_of(Act kind) {
  return with_activation(kind, [](auto act) -> ChainGradFn<E, G> { return &chain_grad<E, decltype(act), G>; });
}

// ---- the products ----------------------------------------------------------------------------------------------------

// out(tile) for every micro-tile of block · panels; the sums are in acc then, rows kNV registers apart.
template <class E, class Out>
DLK_INLINE void chain_product(const typename E::Packed* a, const typename E::Cell* b, int64_t rows, int64_t cols,
                              int64_t k, typename E::Acc* acc, Out&& out) {
  constexpr int64_t nr = kNV * E::kVL;
  const int64_t cells = ceil_div(k, E::kStep), padded = round_up(cols, E::kVL);
  for (int64_t i = 0; i < rows; i += kMR) {
    const int64_t r = min(kMR, rows - i);
    const auto* panel_a = (const typename E::Cell*)(a + i * kPitch<E>);
    for (int64_t j = 0; j < padded; j += nr) {
      const int64_t width = min(nr, padded - j);
      const auto uk = ukernel_for<E, kRowMajor>(r, width / E::kVL);
      const auto* panel_b = b + panel_at<E>(j, nr, cells);
      for (int64_t q = 0; q < cells; q += kSum<E>)
        uk(min(kSum<E>, cells - q), panel_a + q, panel_b + q * width, acc, nr, q > 0);
      out(MicroTile{i, j, r, min(width, cols - j)});
    }
  }
}

// sums[n, k] (pitch) (+)= dzᵀ · h over the rows of a block.
template <class E>
void chain_wgrad(const ChainBuffers<E>& s, const typename E::Packed* dz, const typename E::Packed* h, int64_t rows,
                 const ChainLayer& layer, typename E::Acc* sums, bool add) {
  constexpr int64_t nr = kNV * E::kVL;
  const int64_t pitch = chain_pitch(layer.k), padded = round_up(layer.k, E::kVL), cells = ceil_div(rows, E::kStep);
  constexpr bool in_place = E::kStep == 1;
  if constexpr (!in_place) {
    const View dz_t = {dz, 1, kPitch<E>}, h_rows = {h, kPitch<E>, 1};
    pack_a_cols<E>(Source<E>::of(dz_t, View{}, {}), s.wgrad_a, 0, layer.n, 0, rows, s.run, nullptr);
    pack_b<E>(h_rows, s.wgrad_b, 0, rows, 0, layer.k, s.run);
  }
  for (int64_t j = 0; j < padded; j += nr) {
    const int64_t width = min(nr, padded - j);
    for (int64_t i = 0; i < layer.n; i += kMR) {
      const int64_t r = min(kMR, layer.n - i);
      const auto uk = ukernel_for<E, in_place ? kInPlace : kKMajor>(r, width / E::kVL);
      for (int64_t q = 0; q < cells; q += kSum<E>) {
        const int64_t count = min(kSum<E>, cells - q);
        auto* c = sums + i * pitch + j;
        if constexpr (in_place)
          uk(count, dz + q * kPitch<E> + i, h + q * kPitch<E> + j, c, pitch, add || q > 0);
        else
          uk(count, s.wgrad_a + panel_at<E>(i, kMR, cells) + q * kMR, s.wgrad_b + panel_at<E>(j, nr, cells) + q * width,
             c, pitch, add || q > 0);
      }
    }
  }
}

// ---- a block of rows -------------------------------------------------------------------------------------------------

// Rows of a tensor [·, n] into a block.
template <class E>
void chain_load(const void* from, int64_t n, typename E::Packed* block, int64_t i0, int64_t rows) {
  pack_a_rows<E>(Source<E>::of({from, n, 1}, View{}, {}), (typename E::Cell*)block, i0, rows, 0, n);
}

template <class E>
void chain_block_forward(const Chain& p, const ChainBuffers<E>& s, int64_t i0, int64_t rows) {
  pack_a_rows<E>(Source<E>::of(p.x, View{}, {}), (typename E::Cell*)s.h[0], i0, rows, 0, p.layer[0].k);
  for (int l = 0; l < p.layers; ++l) {
    const ChainLayer& layer = p.layer[l];
    const auto value = chain_value_of<E>(layer.act.kind);
    auto* h = l + 1 < p.layers ? s.h[l + 1] : nullptr;
    chain_product<E>(s.h[l], s.weight[l], rows, layer.n, layer.k, s.acc,
                     [&](const MicroTile& t) { value(layer, t, s.acc, h, i0); });
  }
}

template <class E>
void chain_block_backward(const Chain& p, ChainBuffers<E>& s, int64_t i0, int64_t rows, typename E::Acc* sums,
                          bool first) {
  using Packed = typename E::Packed;
  pack_a_rows<E>(Source<E>::of(p.x, View{}, {}), (typename E::Cell*)s.h[0], i0, rows, 0, p.layer[0].k);
  for (int l = 0; l < p.layers; ++l) {
    if (p.layer[l].h) chain_load<E>(p.layer[l].h, p.layer[l].n, s.h[l + 1], i0, rows);
    if (p.layer[l].z) chain_load<E>(p.layer[l].z, p.layer[l].n, s.z[l], i0, rows);
  }
  auto saved_by = [&](int l) { return s.z[l] ? s.z[l] : s.h[l + 1]; };
  const ChainLayer& top = p.layer[p.layers - 1];
  auto *dz = s.dz[0], *next = s.dz[1];
  pack_a_rows<E>(Source<E>::of(p.grad_y, View{}, {}), (typename E::Cell*)dz, i0, rows, 0, top.n);
  chain_grad_of<E, Packed>(top.act.kind)(top.act, {0, 0, rows, top.n}, dz, kPitch<E>,
                                         top.act.kind == Act::none ? dz : saved_by(p.layers - 1), dz,
                                         s.row_sum[p.layers - 1]);
  for (int l = p.layers - 1; l >= 0; --l) {
    const ChainLayer& layer = p.layer[l];
    s.row_sum[l].flush(layer.n);
    if (layer.dweight) chain_wgrad<E>(s, dz, s.h[l], rows, layer, sums, !first);
    sums -= l > 0 ? p.layer[l - 1].n * chain_pitch(p.layer[l - 1].k) + chain_pitch(p.layer[l - 1].n) : 0;
    if (l > 0) {
      const auto grad = chain_grad_of<E, typename E::Acc>(p.layer[l - 1].act.kind);
      chain_product<E>(dz, s.weight_t[l], rows, layer.k, layer.n, s.acc, [&](const MicroTile& t) {
        grad(p.layer[l - 1].act, t, s.acc, kNV * E::kVL, saved_by(l - 1), next, s.row_sum[l - 1]);
      });
      auto* swap = dz;
      dz = next, next = swap;
    } else if (p.dx) {
      ChainLayer input{};
      input.n = layer.k;
      input.h = p.dx;
      chain_product<E>(dz, s.weight_t[0], rows, layer.k, layer.n, s.acc,
                       [&](const MicroTile& t) { chain_value<E, Identity>(input, t, s.acc, nullptr, i0); });
    }
  }
}

// ---- the calls -------------------------------------------------------------------------------------------------------

template <class E>
void chain_forward_with(const Chain& p, const Parallel& parallel) {
  const int64_t rows = chain_rows<E>(p, false);
  parallel.run(ceil_div(p.rows, rows), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const Chain*)context;
    const int64_t rows = chain_rows<E>(p, false);
    const auto s = ChainBuffers<E>::get(p, rows, false);
    for (int64_t block = begin; block < end; ++block)
      chain_block_forward<E>(p, s, block * rows, min(rows, p.rows - block * rows));
  });
}

template <class E>
void chain_backward_with(const Chain& p, const Parallel& parallel) {
  using A = typename E::Acc;
  using T = typename E::Elem;
  parallel.run(p.slices, &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const Chain*)context;
    const int64_t rows = chain_rows<E>(p, true), blocks = ceil_div(p.rows, rows);
    auto s = ChainBuffers<E>::get(p, rows, true);
    const int64_t top = p.layers - 1, parameters = chain_parameters(p);
    const int64_t to_top = parameters - p.layer[top].n * chain_pitch(p.layer[top].k) - chain_pitch(p.layer[top].n);
    for (int64_t slice = begin; slice < end; ++slice) {
      A* sums = (A*)p.partials + slice * parameters;
      for (int l = 0; l < p.layers; ++l) s.row_sum[l].clear(p.layer[l].n);
      const int64_t first = slice * blocks / p.slices, last = (slice + 1) * blocks / p.slices;
      for (int64_t b = first; b < last; ++b)
        chain_block_backward<E>(p, s, b * rows, min(rows, p.rows - b * rows), sums + to_top, b == first);
      for (int l = 0; l < p.layers; ++l) {
        const ChainLayer& layer = p.layer[l];
        sums += layer.n * chain_pitch(layer.k);
        s.row_sum[l].store(sums, layer.n);
        sums += chain_pitch(layer.n);
      }
    }
  });
  const int64_t parameters = chain_parameters(p);
  const A* sums = (const A*)p.partials;
  for (int l = 0; l < p.layers; ++l) {
    const ChainLayer& layer = p.layer[l];
    const int64_t pitch = chain_pitch(layer.k);
    for (int64_t i = 0; layer.dweight && i < layer.n; ++i)
      sum_slices<T>(sums + i * pitch, p.slices, parameters, (T*)layer.dweight + i * layer.k, 0, layer.k);
    sums += layer.n * pitch;
    if (layer.dbias) sum_slices<T>(sums, p.slices, parameters, (T*)layer.dbias, 0, layer.n);
    sums += chain_pitch(layer.n);
  }
}

}  // namespace dlk::cpu::DLK_ISA
