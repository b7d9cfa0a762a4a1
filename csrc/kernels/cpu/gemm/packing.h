// Blocks of A and B as panels, in the order in which micro-kernels read them, and the scratch of a thread that holds them.
namespace dlk::cpu::DLK_ISA {

// The gap between the panels of a block is one cache line. Without it, panels of 32 KiB would share an L1 set.
template <class E>
constexpr int64_t kPanelGap = 64 / sizeof(typename E::Cell);
// Return the offset of the panel that begins with row (of A) or column (of B) `first`, in cells.
template <class E>
DLK_INLINE int64_t panel_at(int64_t first, int64_t per_panel, int64_t cells) {
  return first * cells + first / per_panel * kPanelGap<E>;
}

// The place of the second product's accumulators, behind those of the first.
constexpr int64_t kUpAt = kMC * (kNC / 2);

// The scratch of one thread, in one allocation.
template <class E>
struct Buffers {
  using Cell = typename E::Cell;
  Cell* a;                         // micro-panels of A
  Cell* b;                         // micro-panels of B
  Cell* b_up;                      // micro-panels of the second B
  typename E::Acc* acc;            // the tile between k blocks, micro-tile by micro-tile
  ColumnSum<E> row_sum;            // [kTallMC], the sums of the rows of A
  typename E::Packed* row_buffer;  // rows on their way into a panel
  double* total;                   // the total of the tile's sums, if it has several

  static constexpr int64_t kRowBuffer = (kTallMC > kNC ? kTallMC : kNC) + DLK_VBYTES;
  // a wide block of few cells has as many panel gaps as it has registers of columns
  static constexpr int64_t kB = kKC<E> * (kNB + kNV * E::kVL) + kNC / E::kVL * kPanelGap<E>;

  // For tasks of a product, or for packing its shared B alone.
  static Buffers get(const Tiling& t, bool packs_b_alone = false) {
    const int64_t rows = t.tall ? kTallMC : kMC, padded = rows * kNV * E::kVL;
    const int64_t in_a = packs_b_alone ? 0 : rows * kAStride<E>;
    const int64_t sums = packs_b_alone ? 0 : (t.tall ? kTallSums : kMC * kNC) + padded;
    const int64_t bytes = sizeof(Cell) * (in_a + kB) + sizeof(typename E::Acc) * sums + sizeof(Cell) * 3 * kRowBuffer +
                          (sizeof(double) + sizeof(typename E::Acc)) * kRowBuffer;
    const int64_t totals = t.has_totals() ? sizeof(double) * sums : 0;
    char* at = (char*)scratch(bytes + totals + (t.products == 2 ? sizeof(Cell) * kB : 0));
    Buffers s;
    s.a = (Cell*)at;
    s.b = s.a + in_a;
    s.acc = (typename E::Acc*)(s.b + kB);
    s.row_buffer = (typename E::Packed*)(s.acc + sums);
    s.row_sum.total = (double*)((Cell*)s.row_buffer + 3 * kRowBuffer);
    s.row_sum.block = (typename E::Acc*)(s.row_sum.total + kRowBuffer);
    s.total = (double*)(at + bytes);
    s.b_up = (Cell*)(at + bytes + totals);
    return s;
  }
};

// Pack A[i0.., p0..] as row-major micro-panels: row i of the block is at i·kAStride, its cells along k.
template <class E>
void pack_a_rows(const RowSource<E>& a, typename E::Cell* out, int64_t i0, int64_t rows, int64_t p0, int64_t ks) {
  for (int64_t i = 0; i < rows; ++i) {
    auto* row = (typename E::Packed*)(out + i * kAStride<E>);
    RowSource<E>::along_row(a, row, i0 + i, p0, ks);
    for (int64_t p = ks; p < cells_of<E>(ks) * E::kStep; ++p) row[p] = {};
  }
}

template <class E>
DLK_INLINE void copy_panel_row(typename E::Cell* to, const typename E::Cell* from) {
  for (int64_t i = 0; i < kMR; i += E::kVL) store_bits(to + i, load_bits<typename E::V>(from + i));
}

// Pack A[i0.., p0..] as k-major micro-panels, [panel][cell][kMR]. With row_sum, add its rows up on the way (dbias).
template <class E>
void pack_a_cols(const RowSource<E>& a, typename E::Cell* out, int64_t i0, int64_t rows, int64_t p0, int64_t ks,
                 typename E::Packed* row_buffer, ColumnSum<E>* row_sum) {
  using Cell = typename E::Cell;
  constexpr int64_t kRowBuffer = Buffers<E>::kRowBuffer;
  const int64_t cells = cells_of<E>(ks), pitch = panel_at<E>(kMR, kMR, cells);
  Cell* line = (Cell*)(row_buffer + 2 * kRowBuffer);
  for (int64_t q = 0; q < cells; ++q) {
    for (int64_t s = 0; s < E::kStep; ++s) {
      auto* r = row_buffer + s * kRowBuffer;
      const int64_t p = q * E::kStep + s;
      if (p < ks) {
        RowSource<E>::along_col(a, r, i0, p0 + p, rows);
        if (row_sum) row_sum->add(r, rows);
      } else {
        for (int64_t i = 0; i < rows; ++i) r[i] = {};
      }
    }
    if constexpr (E::kStep == 2)
      E::make_cells(line, row_buffer, row_buffer + kRowBuffer, rows);
    else
      line = row_buffer;
    // Whole registers are written. Surplus lanes fall on the next k step, which is written later, or in the panel gap.
    static_assert(round_up(kMR, E::kVL) - kMR <= kPanelGap<E>);
    if constexpr (E::kDepth > 1) {
      E::pack_k_step(out, line, q, rows);
    } else {
      Cell* to = out + q * kMR;
      for (int64_t i = 0; i < rows; i += kMR, to += pitch) copy_panel_row<E>(to, line + i);
    }
  }
}

// Return one row of B with zeros beyond its end: its place in B if nothing has to change, otherwise a copy in
// `row_buffer`.
template <class E>
DLK_INLINE const typename E::Packed* b_row(const View& b, const typename E::ElemB* base, int64_t p, int64_t ks,
                                           int64_t cols, int64_t padded, typename E::Packed* row_buffer) {
  const auto* row = base + p * b.row_stride;
  if constexpr (kIsSame<typename E::Packed, typename E::ElemB>) {
    if (b.col_stride == 1 && padded == cols && p < ks) {
      for (int64_t j = 0; j < cols; j += 64 / sizeof(*row)) prefetch_l2(row + kAhead * b.row_stride + j);
      return row;
    }
  }
  if (p < ks) copy_row<E>(row_buffer, row, b.col_stride, cols);
  for (int64_t j = p < ks ? cols : 0; j < padded; ++j) row_buffer[j] = {};
  return row_buffer;
}

// Pack B[p0.., j0..] as micro-panels, [panel][cell][registers of that panel], with zeros beyond the last column.
template <class E>
void pack_b(const View& b, typename E::Cell* out, int64_t p0, int64_t ks, int64_t j0, int64_t cols,
            typename E::Packed* row_buffer) {
  using Cell = typename E::Cell;
  using Elem = typename E::ElemB;
  constexpr int64_t nr = kNV * E::kVL;
  constexpr int64_t kRowBuffer = Buffers<E>::kRowBuffer;
  const Elem* base = (const Elem*)b.data + p0 * b.row_stride + j0 * b.col_stride;
  const int64_t cells = cells_of<E>(ks);
  const int64_t padded = round_up(cols, E::kVL);

  if (b.row_stride == 1 && b.col_stride != 1) {  // contiguous along k: squares of kVL × kVL are transposed
    for (int64_t j = 0; j < padded; j += E::kVL) {
      const int64_t panel = j / nr * nr;
      const int64_t width = min(nr, padded - panel);
      Cell* to = out + panel_at<E>(panel, nr, cells) + (j - panel);
      for (int64_t q = 0; q < cells; q += E::kVL) {
        typename E::V rows[E::kVL];
        const int64_t valid = ks - q * E::kStep;
#pragma GCC unroll 16
        for (int64_t i = 0; i < E::kVL; ++i) {
          __builtin_prefetch(base + (j + i) * b.col_stride + (q + 2 * E::kVL) * E::kStep);
          rows[i] = j + i < cols ? E::load_cells(base + (j + i) * b.col_stride + q * E::kStep, valid) : typename E::V{};
        }
        transpose(rows);
        const int64_t n = min(E::kVL, cells - q);
        for (int64_t i = 0; i < n; ++i) store_bits(to + (q + i) * width, rows[i]);
      }
    }
    return;
  }
  if constexpr (E::kStep == 2 && !kIsSame<typename E::Packed, Elem>) {
    if (b.col_stride == 1) {  // contiguous rows that have to be rounded
      for (int64_t q = 0; q < cells; ++q) {
        const Elem* even = base + q * E::kStep * b.row_stride;
        const int64_t valid = q * E::kStep < ks ? cols : 0;
        const Elem* odd = q * E::kStep + 1 < ks ? even + b.row_stride : nullptr;
        for (int64_t panel = 0; panel < padded; panel += nr)
          E::round_cells(out + panel_at<E>(panel, nr, cells) + q * min(nr, padded - panel), even + panel,
                         odd ? odd + panel : nullptr, valid - panel, min(nr, padded - panel));
        for (int64_t j = 0; j < valid; j += 64 / sizeof(Elem)) {
          prefetch_l2(even + kAhead * b.row_stride + j);
          prefetch_l2(even + (kAhead + 1) * b.row_stride + j);
        }
      }
      return;
    }
  }
  for (int64_t q = 0; q < cells; ++q) {  // other rows
    const auto* even = b_row<E>(b, base, q * E::kStep, ks, cols, padded, row_buffer);
    const auto* odd =
        E::kStep == 2 ? b_row<E>(b, base, q * E::kStep + 1, ks, cols, padded, row_buffer + kRowBuffer) : nullptr;
    for (int64_t panel = 0; panel < padded; panel += nr) {
      const int64_t width = min(nr, padded - panel);
      E::make_cells(out + panel_at<E>(panel, nr, cells) + q * width, even + panel, odd + panel, width);
    }
  }
}

}  // namespace dlk::cpu::DLK_ISA
