// One A block times one B block: the loops over micro-panels, and what happens behind the last sum of a micro-tile.
namespace dlk::cpu::DLK_ISA {

// One product: what all of its tasks read.
template <class E>
struct GemmCall {
  const Gemm* p;       // the product as it is multiplied
  const Gemm* result;  // the product that p is the transpose of, which the epilogue writes; or nullptr
  Tiling t;
  int64_t b_cells;  // of a B block in p->panels
  bool b_in_place;  // whole panels of B are read where they lie
  bool c_in_place;  // the sums are C, without an epilogue, where to_c does not write it
  RowSource<E> a;
  AOrder order;
  EpilogueFn<typename E::ElemC> epilogue;
  GluEpilogueFn<typename E::ElemC> glu;  // of two products; nullptr: there is one
  UkernelsToC<E> to_c;                   // of whole micro-tiles, which need no epilogue behind them
};

// One A block times one B block, as a part of a task.
template <class E>
struct Block {
  int64_t i0, j0, tk;  // the place in C, and the k-slice
  int64_t rows, cols, cells;
  bool first, last;                 // this k block is the first, the last of its sum
  double* total;                    // the total of the tile's sums, laid out like acc; nullptr: there is only one sum
  bool first_sum, last_sum;         // its sum is the first, the last of the tile
  bool waits;                       // its sums wait for those of the second product
  const typename E::Cell* b_there;  // B in place at this block, or nullptr
};

// Add a finished sum to the total. After the last sum, c receives the total.
template <class A>
void add_to_total(A* c, int64_t ldc, double* total, int64_t ld, int64_t rows, int64_t cols, bool first, bool last) {
  for (int64_t i = 0; i < rows; ++i, c += ldc, total += ld) {
    if (!first)
      for (int64_t j = 0; j < cols; ++j) total[j] += c[j];
    else
      for (int64_t j = 0; j < cols; ++j) total[j] = c[j];
    if (last)
      for (int64_t j = 0; j < cols; ++j) c[j] = (A)total[j];
  }
}

// Finish a sum of the micro-tile at i and j of the block. It is at c: rows × cols of C, in `width` padded columns. Add it to the
// total. After the last sum of the tile run the epilogue, or store a partial sum.
template <class E>
void finish_micro_tile(const GemmCall<E>& call, const Block<E>& at, typename E::Acc* c, int64_t micro_tile, int64_t i,
                       int64_t j, int64_t rows, int64_t cols, int64_t width) {
  constexpr int64_t nr = kNV * E::kVL;
  const Gemm& p = *call.p;
  const int64_t i0 = at.i0 + i, j0 = at.j0 + j;
  if (at.total) add_to_total(c, nr, at.total + micro_tile, nr, rows, width, at.first_sum, at.last_sum);
  if (!at.last_sum || at.waits) return;
  if constexpr (kTransposes)
    if (call.result) return transposed_epilogue<E>(*call.result, call.epilogue, c, j0, i0, cols, rows);
  if (call.glu) return call.glu(p, c - kUpAt, c, nr, i0, j0, rows, cols);
  if (call.t.kt == 1) return call.epilogue(p, c, nr, i0, j0, rows, cols);
  auto* part = (typename E::Acc*)p.partials + (at.tk * p.m + i0) * p.n + j0;
  for (int64_t x = 0; x < rows; ++x)
    for (int64_t y = 0; y < cols; ++y) part[x * p.n + y] = c[x * nr + y];
}

// Multiply the packed A block and the B block into acc, and finish the micro-tiles whose sums end with it.
//
// The first loop over columns takes whole micro-tiles. It does little for each of them: one with k = 64 is 400 cycles long.
template <class E>
void multiply_block(const GemmCall<E>& call, const Block<E>& at, const typename E::Cell* block_a,
                    const typename E::Cell* block_b, typename E::Acc* acc, int64_t ld, Ahead& next_b, Ahead& next_a) {
  using A = typename E::Acc;
  using Cell = typename E::Cell;
  using M = typename E::Multiply;
  constexpr int64_t nr = kNV * E::kVL;
  const Gemm& p = *call.p;
  const int64_t padded = round_up(at.cols, E::kVL), per_sum = call.t.per_sum;
  const bool row_major = call.order == kRowMajor || E::kDepth > 1;
  // With one k block all micro-tiles use the same accumulators, which stay in L1.
  const bool one_block = at.first && at.last && !call.glu;
  const bool c_in_place = call.c_in_place && one_block && !at.total;
  const bool to_c = call.to_c.plain && row_major && at.last && !at.total;
  const auto uk_of = [&](int64_t rows, int64_t registers, bool next) {
    return row_major ? ukernel_for<M, kRowMajor>(rows, registers, next)
                     : ukernel_for<M, kKMajor>(rows, registers, next);
  };
  const bool sums_in_c = c_in_place && !to_c;  // of whole micro-tiles
  const int64_t ldc = sums_in_c ? p.n : nr;
  const auto plain = uk_of(kMR, kNV, false), prefetching = uk_of(kMR, kNV, true);
  const int64_t a_step = row_major ? 1 : kMR;
  for (int64_t i = 0; i < at.rows; i += kMR) {
    const int64_t r = min(kMR, at.rows - i);
    const Cell* const panel_a = block_a + (row_major ? i * kAStride<E> : panel_at<E>(i, kMR, at.cells));
    A* const row_of_c = (A*)p.c + (at.i0 + i) * p.n + at.j0;  // where sums are C
    int64_t j = 0;
    const int64_t ldb = at.b_there ? p.b.row_stride : nr;
    for (; r == kMR && j + nr <= at.cols; j += nr) {
      const Cell* const panel_b = at.b_there ? at.b_there + j : block_b + panel_at<E>(j, nr, at.cells);
      A* const c = sums_in_c ? row_of_c + j : one_block ? acc : acc + i * ld + j * kMR;
      Ahead& ahead = Ahead::empty(next_b) ? next_a : next_b;
      int64_t q = 0;
      for (; q + per_sum < at.cells; q += per_sum)  // the sums before the last
        Ahead::serve(ahead, per_sum, [&](const LinesAhead* next) {
          (next ? prefetching : plain)(per_sum, panel_a + q * a_step, panel_b + q * ldb, ldb, c, ldc,
                                       !at.first || q > 0, next);
        });
      const int64_t cells = at.cells - q;
      const Cell *const a = panel_a + q * a_step, *const b = panel_b + q * ldb;
      const bool add = !at.first || q > 0;
      Ahead::serve(ahead, cells, [&](const LinesAhead* next) {
        if (to_c)
          (next ? call.to_c.prefetching : call.to_c.plain)(cells, a, b, ldb, c, add, next,
                                                           TileOfC<typename E::ElemC>::of(p, at.i0 + i, at.j0 + j));
        else
          (next ? prefetching : plain)(cells, a, b, ldb, c, ldc, add, next);
      });
      if (at.last && !to_c && !sums_in_c) finish_micro_tile<E>(call, at, c, i * ld + j * kMR, i, j, r, nr, nr);
    }
    for (; j < padded; j += nr) {
      const int64_t width = min(nr, padded - j), n = min(width, at.cols - j);
      const bool b_in_place = at.b_there && n == nr, in_place = c_in_place && n == width;
      const Cell* const panel_b = b_in_place ? at.b_there + j : block_b + panel_at<E>(j, nr, at.cells);
      const int64_t edge_ldb = b_in_place ? ldb : width;
      A* const c = in_place ? row_of_c + j : one_block ? acc : acc + i * ld + j * kMR;
      const auto uk = uk_of(r, width / E::kVL, false);
      for (int64_t q = 0; q == 0 || q < at.cells; q += per_sum)
        uk(min(per_sum, at.cells - q), panel_a + q * a_step, panel_b + q * edge_ldb, edge_ldb, c, in_place ? p.n : nr,
           !at.first || q > 0, nullptr);
      if (at.last && !in_place) finish_micro_tile<E>(call, at, c, i * ld + j * kMR, i, j, r, n, width);
    }
  }
}

}  // namespace dlk::cpu::DLK_ISA
