// The loop nest of the packed product. C is cut in tiles that fit L2. A task computes one tile, and packs what it
// multiplies.
//
//   task (tile of C)                          threads take tasks from one counter; a task has no barrier
//     for each k block                        the A block is packed to scratch of the thread (dz is made here)
//       for each B block                      packed likewise, or in advance for all tasks, or read in place; in L2
//         for each A micro-panel              stays in L1
//           for each B micro-panel            streams from L2
//             micro-kernel                    accumulators in registers; prefetches what comes next (ahead.h)
//             total                           after every kTotalCells cells of k, in f64
//             epilogue                        after the last k block, in registers (TileOfC) or with the sums still in L1
//
// Every element of C is accumulated over k in the same order for every tiling, so the result does not depend on the
// number of threads.
//
// A gated layer's forward has two B (Gemm::b_up). A task multiplies its packed A block by a block of each. The sums of
// both products stay in its accumulators, and the epilogue takes them together.
namespace dlk::cpu::DLK_ISA {

// Where the packed block of a thread comes from. Neighbouring tasks that share a block pack it once.
struct PackedBlockKey {
  int64_t at = -1, p0 = -1;

  // Move to the block at these coordinates, and return whether it is another one, which has to be packed.
  DLK_HD bool move_to(int64_t new_at, int64_t new_p0) {
    const bool same = at == new_at && p0 == new_p0;
    at = new_at, p0 = new_p0;
    return !same;
  }
};

// Return whether whole panels of B may be read where they lie, which saves packing them: their rows are cells, few rows
// of A read them, and the pitch does not put the rows of a block in so few sets of L2 that they drive each other out.
// A second B lies like the first.
template <class E>
bool reads_b_in_place(const Gemm& p) {
  // Processors without AVX-512 have as little as 256 or 512 KiB of L2. At 64x512x512, dgrad, packing was 1.08 times as fast.
  constexpr int64_t few = 4 * kMR, bad_pitch = (kMR == 6 ? 2048 : 8192) / sizeof(typename E::Cell);
  const bool alike = !p.gated || (p.b_up.col_stride == 1 && p.b_up.row_stride == p.b.row_stride);
  return kIsSame<typename E::Cell, typename E::ElemB> && !p.panels && p.b.col_stride == 1 && alike &&
         p.m <= kInPlaceRows && (p.m <= few || p.b.row_stride % bad_pitch != 0);
}

// Return whether sums are stored to C as they are. The tiles of AMX have rows that C does not have.
template <class E>
bool stores_sums(const Gemm& p) {
  const bool no_activation = p.saved.data || p.act.kind == Act::none;
  return kIsSame<typename E::Acc, typename E::ElemC> && E::kDepth == 1 && p.splits == 1 && no_activation && !p.bias &&
         !p.z && !p.below_saved && !p.gated && p.output_mode != OutputMode::accumulate;
}

template <class E>
DLK_INLINE typename E::Cell* shared_block(const GemmCall<E>& call, int64_t block) {
  return (typename E::Cell*)call.p->panels + block * call.b_cells;
}

// Pack one B block to p.panels, for all tasks.
template <class E>
void pack_shared_block(const GemmCall<E>& call, int64_t block, Buffers<E>& s) {
  const Tiling& t = call.t;
  const Gemm& p = *call.p;
  auto* const to = shared_block(call, block);
  const bool is_up = block >= t.b_blocks();
  block -= is_up ? t.b_blocks() : 0;
  const int64_t jb = block % t.blocks_per_tile(), tj = block / t.blocks_per_tile() % t.nt;
  const int64_t k_block = block / t.blocks_per_tile() / t.nt % t.k_blocks();
  const int64_t tk = block / t.blocks_per_tile() / t.nt / t.k_blocks();
  const int64_t p0 = tk * t.k_slice + k_block * t.kb, j0 = tj * t.nc + jb * t.nb;
  const int64_t ks = min(min(t.kb, (tk + 1) * t.k_slice - p0), p.k - p0);
  const int64_t cols = min(min(t.nb, (tj + 1) * t.nc - j0), p.n - j0);
  if (ks > 0 && cols > 0) pack_b<E>(is_up ? p.b_up : p.b, to, p0, ks, j0, cols, s.row_buffer);
}

// One task: a tile of C over one k-slice. Its rows, columns and k elements begin at i0, j0 and k0. It is number tj among the
// tiles of its rows, and tk among the slices.
struct Tile {
  int64_t i0, rows, tj, j0, cols, k0, k1, tk;
};

template <class E>
Tile tile_of(const GemmCall<E>& call, int64_t task) {
  const Gemm& p = *call.p;
  const Tiling& t = call.t;
  const int64_t tk = task / (t.mt * t.nt), c = task % (t.mt * t.nt);
  const int64_t ti = c / t.nt, tj = c % t.nt;  // the next task is the tile to the right, which shares A
  const int64_t panels = ceil_div(p.m, kMR);   // tiles are equally high, to one panel
  const int64_t i0 = panels * ti / t.mt * kMR, i1 = min(panels * (ti + 1) / t.mt * kMR, p.m);
  const int64_t j0 = tj * t.nc, k0 = min(tk * t.k_slice, p.k);
  return {i0, i1 - i0, tj, j0, min(t.nc, p.n - j0), k0, min(k0 + t.k_slice, p.k), tk};
}

// The tasks of a product. Threads take one after the other, so that a thread that is slowed down runs fewer.
struct TaskQueue {
  int64_t count;
  int64_t* taken;     // by all threads
  int64_t mine = -1;  // taken by this thread, and not run yet

  // Return the task that this thread runs next, or -1 if there is none.
  int64_t next() {
    if (mine < 0) mine = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
    return mine < count ? mine : -1;
  }
  int64_t take() {
    const int64_t task = next();
    mine = -1;
    return task;
  }
};

// The state of a thread, from its first task to its last.
template <class E>
struct Worker {
  TaskQueue tasks;
  Buffers<E> buffers;
  PackedBlockKey a, b[2];
};

// The k block that a thread multiplies next: of the same tile, or the first one of its next task.
struct Following {
  Tile tile;
  int64_t p0;
  bool packs_a, packs_b;  // neither at the end of the last task
};

template <class E>
Following following(const GemmCall<E>& call, const Tile& tile, int64_t p0, TaskQueue& tasks) {
  const bool last = p0 + call.t.kb >= tile.k1;
  const int64_t task = last ? tasks.next() : -1;
  if (last && task < 0) return {tile, p0, false, false};
  const Tile next = last ? tile_of<E>(call, task) : tile;
  const int64_t next_p0 = last ? next.k0 : p0 + call.t.kb;
  const bool sums_rows = call.p->row_sum && next.tj == 0;
  return {next, next_p0, next.i0 != tile.i0 || next_p0 != p0 || sums_rows,
          !call.p->panels && (next.j0 != tile.j0 || next_p0 != p0 || call.t.nb < tile.cols)};
}

// The A block at k = p0, where it lies in memory.
template <class E>
Ahead a_ahead(const GemmCall<E>& call, const Tile& tile, int64_t p0) {
  using Elem = typename E::Elem;
  const int64_t ks = min(call.t.kb, tile.k1 - p0);
  Ahead ahead;
  ahead.add(RowsAhead::of_block<Elem>(call.a.view, tile.i0, tile.rows, p0, ks));
  if (call.a.grad) ahead.add(RowsAhead::of_block<Elem>(call.a.saved, tile.i0, tile.rows, p0, ks));
  return ahead;
}

// A B block, likewise. Column jb of the tile is its first.
template <class E>
Ahead b_ahead(const GemmCall<E>& call, const View& b, const Tile& tile, int64_t p0, int64_t jb) {
  const int64_t ks = min(call.t.kb, tile.k1 - p0), cols = min(call.t.nb, tile.cols - jb);
  Ahead ahead;
  ahead.add(RowsAhead::of_block<typename E::ElemB>(b, p0, ks, tile.j0 + jb, cols));
  return ahead;
}

// A shared B block, where it lies packed.
template <class E>
Ahead shared_ahead(const GemmCall<E>& call, int64_t block) {
  Ahead ahead;
  ahead.add(RowsAhead::of(shared_block(call, block), 1, call.b_cells * sizeof(typename E::Cell), 0));
  return ahead;
}

// The B block that is multiplied behind the one at column jb of `product`.
template <class E>
Ahead next_b_ahead(const GemmCall<E>& call, const Tile& tile, int64_t p0, int64_t jb, int64_t product,
                   const Following& next) {
  const Tiling& t = call.t;
  const Gemm& p = *call.p;
  const int64_t k_block = (p0 - tile.k0) / t.kb;
  const auto shared = [&](int64_t k_block, int64_t jb) { return t.b_block(tile.tk, k_block, tile.tj, jb / t.nb); };
  if (product + 1 < t.products)
    return p.panels ? shared_ahead<E>(call, t.b_blocks() + shared(k_block, jb))
                    : b_ahead<E>(call, p.b_up, tile, p0, jb);
  if (jb + t.nb < tile.cols)
    return p.panels ? shared_ahead<E>(call, shared(k_block, jb + t.nb)) : b_ahead<E>(call, p.b, tile, p0, jb + t.nb);
  if (p.panels && p0 + t.kb < tile.k1) return shared_ahead<E>(call, shared(k_block + 1, 0));
  return next.packs_b ? b_ahead<E>(call, p.b, next.tile, next.p0, 0) : Ahead{};
}

// Return the lines that the micro-kernels of a block prefetch.
template <class E>
int64_t lines_per_block(int64_t rows, int64_t cols, int64_t cells) {
  return rows / kMR * (cols / (kNV * E::kVL)) * ceil_div(cells, kStepsPerLine);
}

template <class E>
void run_tile(const GemmCall<E>& call, const Tile& tile, Worker<E>& w) {
  using A = typename E::Acc;
  constexpr int64_t nr = kNV * E::kVL;
  const Gemm& p = *call.p;
  const Tiling& t = call.t;
  Buffers<E>& s = w.buffers;
  const auto [i0, rows, tj, j0, cols, k0, k1, tk] = tile;
  const bool sum_rows = p.row_sum && tj == 0;
  if (sum_rows) s.row_sum.clear(rows);

  for (int64_t p0 = k0; p0 < k1 || p0 == k0; p0 += t.kb) {  // with an empty k the tile is still written
    const int64_t ks = min(t.kb, k1 - p0), k_block = (p0 - k0) / t.kb, in_sum = k_block % t.per_total;
    const bool last = p0 + t.kb >= k1;
    const bool new_a = w.a.move_to(i0, p0) || sum_rows;
    if (new_a && call.order == kRowMajor)
      pack_a_rows<E>(call.a, s.a, i0, rows, p0, ks);
    else if (new_a)
      pack_a_cols<E>(call.a, s.a, i0, rows, p0, ks, s.row_buffer, sum_rows ? &s.row_sum : nullptr);
    const Following next = following<E>(call, tile, p0, w.tasks);
    // The next A is prefetched as late as there is room for it beside the next B.
    Ahead next_a = next.packs_a ? a_ahead<E>(call, next.tile, next.p0) : Ahead{};
    const int64_t b_lines = p.panels ? call.b_cells * sizeof(typename E::Cell) / 64 : 0;
    const int64_t room = lines_per_block<E>(rows, min(cols, t.nb), cells_of<E>(ks)) - b_lines;
    int64_t blocks_left = ceil_div(cols, t.nb) * t.products;
    bool prefetches_a = false;
    for (int64_t jb = 0; jb < cols; jb += t.nb) {
      const int64_t width = min(t.nb, cols - jb);
      const int64_t shared = p.panels ? t.b_block(tk, k_block, tj, jb / t.nb) : 0;
      for (int64_t product = 0; product < t.products; ++product) {
        const bool is_up = product == 1, waits = product + 1 < t.products;
        const View& b = is_up ? p.b_up : p.b;
        auto* const own_b = is_up ? s.b_up : s.b;
        const auto* block_b = own_b;
        if (p.panels)
          block_b = shared_block(call, product * t.b_blocks() + shared);
        else if (const int64_t there = call.b_in_place ? width / nr * nr : 0;
                 there < width && w.b[product].move_to(j0 + jb, p0))
          pack_b<E>(b, own_b + panel_at<E>(there, nr, cells_of<E>(ks)), p0, ks, j0 + jb + there, width - there,
                    s.row_buffer);
        const int64_t sums = product * kUpAt + jb * kMR;
        Block<E> at = {i0,
                       j0 + jb,
                       tk,
                       rows,
                       width,
                       cells_of<E>(ks),
                       in_sum == 0,
                       last || in_sum + 1 == t.per_total,
                       t.has_totals() ? s.total + sums : nullptr,
                       k_block < t.per_total,
                       last,
                       waits,
                       nullptr};
        if (call.b_in_place) at.b_there = (const typename E::Cell*)b.data + p0 * b.row_stride + j0 + jb;
        Ahead next_b = next_b_ahead<E>(call, tile, p0, jb, product, next), none;
        --blocks_left;
        prefetches_a = prefetches_a || blocks_left * room < next_a.lines();
        multiply_block<E>(call, at, s.a, block_b, s.acc + sums, round_up(cols, nr), next_b,
                          prefetches_a ? next_a : none);
      }
    }
  }
  if (sum_rows) {
    s.row_sum.flush(rows);
    if (t.kt == 1)
      s.row_sum.store((typename E::ElemC*)p.row_sum + i0, rows);
    else  // behind the slices of C
      s.row_sum.store((A*)p.partials + t.kt * p.m * p.n + tk * p.m + i0, rows);
  }
}

// out[i] = Σ of parts[slice, i] over `count` slices, in order and as if in twice the precision. With `add` the sum is
// added to out[i].
template <class T, class C>
void sum_slices(const Acc<T>* parts, int64_t count, int64_t n, C* out, int64_t begin, int64_t end, bool add = false) {
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    const int64_t valid = min(kLanes<T>, end - i);
    ExactLanes<Vec<Acc<T>>> exact;
    for (int64_t s = 0; s < count; ++s) exact.add(load_partial(parts + s * n + i, 1, valid));
    auto sum = exact.value();
    if (add) sum = load_partial(out + i, 1, valid) + sum;
    store_partial(out + i, sum, valid);
  }
}

template <class E>
int64_t b_block_cells(const Tiling& t) {
  const int64_t cells = cells_of<E>(min(t.kb, t.k_slice)), cols = round_up(t.nb, E::kVL);
  return round_up(cells * cols + ceil_div(cols, kNV * E::kVL) * kPanelGap<E>, kPanelGap<E>);
}

// Return the bytes of p.panels, or 0 where packing B once for all tasks does not pay. It pays where several tiles would
// pack the same block.
template <class E>
int64_t panels_size(const Gemm& of, int threads) {
  const Gemm p = multiplies_transposed<E>(of) ? transposed_product(of) : of;
  const Tiling t = tile<E>(p, threads);
  const bool shares = t.mt >= kSharedTiles || (t.mt == 2 && p.k * p.n <= kSharedByTwo);
  return shares ? t.products * t.b_blocks() * b_block_cells<E>(t) * sizeof(typename E::Cell) : 0;
}

template <class E>
void gemm_with(const Gemm& result, const Parallel& parallel) {
  using C = typename E::ElemC;
  const bool transposed = multiplies_transposed<E>(result);
  const Gemm p = transposed ? transposed_product(result) : result;
  // dzᵀ is contiguous along its rows. All other operands are read along k.
  const bool k_major = p.a.row_stride == 1 && p.a.col_stride != 1;
  const AOrder order = k_major || p.row_sum ? kKMajor : kRowMajor;
  const Tiling t = tile<E>(p, parallel.threads);
  const GemmCall<E> call = {&p,
                            transposed ? &result : nullptr,
                            t,
                            b_block_cells<E>(t),
                            reads_b_in_place<E>(p),
                            !transposed && stores_sums<E>(p),
                            RowSource<E>::of(p.a, p.saved, p.act),
                            order,
                            epilogue_of<C, typename E::ElemB>(p),
                            glu_epilogue_of<C, typename E::ElemB>(p),
                            transposed ? UkernelsToC<E>{} : UkernelsToC<E>::of(p)};
  if (p.panels)
    parallel.run(t.products * t.b_blocks(), &call, [](const void* context, int64_t begin, int64_t end) {
      const auto& call = *(const GemmCall<E>*)context;
      auto buffers = Buffers<E>::get(call.t, true);
      for (int64_t block = begin; block < end; ++block) pack_shared_block<E>(call, block, buffers);
    });
  struct Run {
    const GemmCall<E>* call;
    int64_t* taken;
  };
  int64_t taken = 0;
  const Run run = {&call, &taken};
  parallel.run(min(parallel.threads, t.tasks()), &run, [](const void* context, int64_t, int64_t) {
    const auto& [of, taken] = *(const Run*)context;
    const GemmCall<E>& call = *of;
    const Tiling& t = call.t;
    Worker<E> worker = {{t.tasks(), taken}, Buffers<E>::get(t), {}, {}};
    [[maybe_unused]] const typename E::Scope scope;
    for (int64_t task; (task = worker.tasks.take()) >= 0;) run_tile<E>(call, tile_of<E>(call, task), worker);
  });
  if (call.t.kt == 1) return;
  const int64_t chunk = 4096;
  parallel.run(ceil_div(p.m * p.n, chunk), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const GemmCall<E>*)context;
    const Gemm& p = *call.p;
    const int64_t total = p.m * p.n, from = begin * chunk, to = min(end * chunk, total);
    const auto* parts = (const Acc<C>*)p.partials;
    if (p.output_mode == OutputMode::cast) return sum_slices<C>(parts, call.t.kt, total, (C*)p.c, from, to);
    sum_slices<C>(parts, call.t.kt, total, (Acc<C>*)p.c, from, to, p.output_mode == OutputMode::accumulate);
  });
  if (p.row_sum) sum_slices<C>((Acc<C>*)p.partials + call.t.kt * p.m * p.n, call.t.kt, p.m, (C*)p.row_sum, 0, p.m);
}

template <class E>
constexpr PackedProduct packed_product() {
  return {&gemm_with<E>, &panels_size<E>, sizeof(typename E::Packed) >= sizeof(typename E::Elem)};
}

}  // namespace dlk::cpu::DLK_ISA
