// Forward for few rows on AMX: y = act(x · weightᵀ + bias). It is limited by how fast weight can be read, so the tiles
// load the rows of weight directly from memory. Here weight is the A operand and xᵀ the B operand, and the result is
// yᵀ. Only x is packed, and every thread packs its own copy.
//
//   task (32 columns of y)
//     for each 32 rows of x
//       for each sum of kTotalCells cells     added in f64, as in gemm.h
//         whole steps                         tiles load rows of weight, unpacked
//         the last step, if k ends within it  from a copy with zeros behind it, because 0 · NaN is not 0
//       transpose to y, epilogue
namespace dlk::cpu::DLK_ISA {

// One call.
template <class E>
struct FewRowsTiles {
  static constexpr int64_t kRows = kMR;
  const Gemm* p;
  EpilogueFn<typename E::ElemC> epilogue;
  int64_t cells;  // of a row, padded to whole steps

  // Return the cells of a row that are whole steps, which tiles can load from weight.
  DLK_HD int64_t whole() const { return p->k / (E::kDepth * E::kStep) * E::kDepth; }
};

// The scratch of one thread, in one allocation.
template <class E>
struct FewRowsBuffers {
  using Tiles = FewRowsTiles<E>;
  typename E::Cell* x;             // panels of 32 rows of x
  typename E::Packed* row_buffer;  // rows on their way into a panel
  typename E::Cell* edge;   // rows of weight with zeros behind them: the last step, or all steps where rows are missing
  float *yt_tile, *y_tile;  // 32 × 32 sums of yᵀ, of y
  double* total;

  static FewRowsBuffers get(const Tiles& call) {
    constexpr int64_t square = Tiles::kRows * Tiles::kRows, row_buffer = 2 * Buffers<E>::kRowBuffer;
    const int64_t x = panel_at<E>(round_up(call.p->m, Tiles::kRows), Tiles::kRows, call.cells);
    const int64_t edge = Tiles::kRows * call.cells;
    char* at = (char*)scratch(sizeof(double) * square + sizeof(float) * 2 * square +
                              sizeof(typename E::Cell) * (x + edge) + sizeof(typename E::Packed) * row_buffer);
    FewRowsBuffers s;
    s.total = (double*)at;
    s.yt_tile = (float*)(s.total + square);
    s.y_tile = s.yt_tile + square;
    s.x = (typename E::Cell*)(s.y_tile + square);
    s.edge = s.x + x;
    s.row_buffer = (typename E::Packed*)(s.edge + edge);
    return s;
  }
};

// Copy rows of weight from k on, `cells` cells of each, with zeros behind the last element and behind the last row.
template <class E>
void copy_edge(const Gemm& p, int64_t j0, int64_t rows, int64_t k, int64_t cells, typename E::Cell* out) {
  const auto* weight = (const typename E::ElemB*)p.b.data;
  const int64_t elements = cells * E::kStep, there = min(elements, p.k - k);
  for (int64_t j = 0; j < FewRowsTiles<E>::kRows; ++j, out += cells) {
    auto* row = (typename E::Packed*)out;
    const int64_t n = j < rows ? there : 0;
    if (n > 0) __builtin_memcpy(row, weight + (j0 + j) * p.b.col_stride + k, n * sizeof(*row));
    for (int64_t i = n; i < elements; ++i) row[i] = {};
  }
}

// The rows of weight of one task. The first `whole` cells of each are read in place, the last step from the copy
// `edge`.
template <class E>
struct FewRowsWeight {
  const typename E::Cell* rows;
  int64_t row_bytes, whole;

  static FewRowsWeight of(const FewRowsTiles<E>& call, const FewRowsBuffers<E>& s, int64_t j0, int64_t columns) {
    const Gemm& p = *call.p;
    if (columns < call.kRows) {
      copy_edge<E>(p, j0, columns, 0, call.cells, s.edge);
      return {s.edge, call.cells * (int64_t)sizeof(*s.edge), call.cells};
    }
    if (call.whole() < call.cells) copy_edge<E>(p, j0, columns, call.whole() * E::kStep, E::kDepth, s.edge);
    const auto* first = (const typename E::ElemB*)p.b.data + j0 * p.b.col_stride;
    return {(const typename E::Cell*)first, p.b.col_stride * (int64_t)sizeof(*first), call.whole()};
  }
};

// Compute one task for rows i0.. of x, into s.y_tile.
template <class E>
void few_rows_tile(const FewRowsTiles<E>& call, const FewRowsBuffers<E>& s, const FewRowsWeight<E>& weight,
                   int64_t i0) {
  using Cell = typename E::Cell;
  constexpr int64_t size = FewRowsTiles<E>::kRows;
  const Gemm& p = *call.p;
  const int64_t width = min(size, round_up(p.m - i0, E::kVL));
  const auto streamed = width > E::kVL ? &tile_product<E, 2, 2, true> : &tile_product<E, 2, 1, true>;
  const auto packed = width > E::kVL ? &tile_product<E, 2, 2, false> : &tile_product<E, 2, 1, false>;
  const auto* x = s.x + panel_at<E>(i0, size, call.cells);
  for (int64_t q = 0; q == 0 || q < call.cells; q += kTotalCells<E>) {
    const int64_t to = min(q + kTotalCells<E>, call.cells);
    streamed(max(min(to, weight.whole) - q, 0), weight.rows + q, weight.row_bytes, x + q * width, s.yt_tile, size,
             false);
    if (to > weight.whole)
      packed(E::kDepth, s.edge, E::kDepth * sizeof(Cell), x + weight.whole * width, s.yt_tile, size, true);
    if (call.cells > kTotalCells<E>) add_to_total(s.yt_tile, size, s.total, size, size, size, q == 0, to == call.cells);
  }
  transpose_squares<E>(s.yt_tile, size, size, size, s.y_tile, size);
}

template <class E>
void few_rows_tiles(const Gemm& p, const Parallel& parallel) {
  using Tiles = FewRowsTiles<E>;
  const Tiles call = {&p, epilogue_of<typename E::ElemC, typename E::ElemB>(p), cells_of<E>(p.k)};
  parallel.run(ceil_div(p.n, Tiles::kRows), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const Tiles*)context;
    const Gemm& p = *call.p;
    const auto s = FewRowsBuffers<E>::get(call);
    [[maybe_unused]] const typename E::Scope scope;
    pack_b<E>(p.a.transposed(), s.x, 0, p.k, 0, p.m, s.row_buffer);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j0 = task * Tiles::kRows, columns = min(Tiles::kRows, p.n - j0);
      const auto weight = FewRowsWeight<E>::of(call, s, j0, columns);
      for (int64_t i = 0; i < p.m; i += Tiles::kRows) {
        few_rows_tile<E>(call, s, weight, i);
        call.epilogue(p, s.y_tile, Tiles::kRows, i, j0, min(Tiles::kRows, p.m - i), columns);
      }
    }
  });
}

}  // namespace dlk::cpu::DLK_ISA
