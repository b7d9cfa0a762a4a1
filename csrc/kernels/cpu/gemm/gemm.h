// The loop nest of the packed product. C is cut in tiles that fit L2. A task computes one tile, and packs what it
// multiplies.
//
//   task (tile of C)                          threads take tasks; a task has no barrier
//     for each k block                        the A block is packed to scratch of the thread (dz is made here)
//       for each B block                      packed likewise, or in advance for all tasks, or read in place; in L2
//         for each A micro-panel              stays in L1
//           for each B micro-panel            streams from L2
//             micro-kernel                    accumulators in registers
//             total                           after every kTotalCells cells of k, in f64
//             epilogue                        after the last k block, with the micro-tile still in L1
//
// Every element of C is accumulated over k in the same order for every tiling, so the result does not depend on the
// number of threads.
//
// A gated layer's forward has two B (Gemm::b_up). A task multiplies its packed A block by a block of each. The sums of
// both products stay in its accumulators, and the epilogue takes them together.
namespace dlk::cpu::DLK_ISA {

DLK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
DLK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
DLK_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DLK_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Return the cells along k of a panel with ks elements: whole steps of the micro-kernel, with zeros behind the last
// element.
template <class E>
DLK_INLINE int64_t cells_of(int64_t ks) {
  return round_up(ceil_div(ks, E::kStep), E::kDepth);
}

// Limits of a tile of C. It is at most 24 micro-panels high (8 with AMX), so that a packed element of B serves 336 rows
// (256 with AMX). An A block, which costs more to make because of dz, serves up to kNC columns. Between k blocks the
// accumulators of a tile cost 8 bytes of traffic per kKC FMAs. AMX multiplies 12 times as fast, so with it the
// accumulators must stay in L2 (1 MiB). B blocks of kKC × kNB (256 KiB) stay in L2 beside the A block.
constexpr int64_t kMC = (kMR < 16 ? 24 : 8) * kMR;
constexpr int64_t kNC = kMR == 14 ? 2048 : 1024;
constexpr int64_t kNB = kMR < 16 ? 256 : 512;
// Where there are many tiles of several k blocks and many columns, they are at most this high. Half of the A block and of
// the accumulators leaves room in L2 for the next B block, and tiles twice as wide need A packed half as often. Measured
// on AVX-512 alone.
constexpr int64_t kLowMC = kMR == 14 ? kMC / 2 : kMC;
constexpr int64_t kLowColumns = 3 * kNB;
// B is read in place by at most so many rows of A: packing it would cost more than its rows, which lie apart in memory.
constexpr int64_t kInPlaceRows = 20 * kMR;
// From this many tiles above each other on, the tiles share one packed B.
constexpr int64_t kSharedTiles = 3;

// How one product is cut in tiles, slices and blocks.
struct Tiling {
  int64_t mc, nc;       // tile of C
  int64_t nb;           // columns of a B block
  int64_t mt, nt;       // tiles per direction
  int64_t k_slice, kt;  // k elements per slice, slices
  int64_t kb;           // k elements per k block; the blocks of a slice are equal
  bool one_block;       // a slice is one k block, and tiles below each other share their B block
  int64_t per_total;    // k blocks per addition to the total
  int64_t per_sum;      // k cells per running sum
  int64_t products;     // 1; or 2, which share A and the epilogue
  DLK_HD bool has_totals() const { return k_blocks() > per_total; }
  DLK_HD int64_t tasks() const { return mt * nt * kt; }

  // B blocks are numbered by slice, k block, tile, block of the tile. Those of a second B come behind them.
  DLK_HD int64_t k_blocks() const { return max(1, ceil_div(k_slice, kb)); }
  DLK_HD int64_t blocks_per_tile() const { return ceil_div(nc, nb); }
  DLK_HD int64_t b_blocks() const { return kt * k_blocks() * nt * blocks_per_tile(); }
  DLK_HD int64_t b_block(int64_t tk, int64_t k_block, int64_t tj, int64_t block) const {
    return ((tk * k_blocks() + k_block) * nt + tj) * blocks_per_tile() + block;
  }
};

// Return the tiling that minimises the work of the busiest thread: FMAs, and the packing that smaller tiles repeat.
template <class E>
Tiling tile(const Gemm& p, int threads) {
  constexpr int64_t nr = kNV * E::kVL;
  constexpr int64_t kblock = kKC<E> * E::kStep;
  const int64_t products = p.gated ? 2 : 1, most_nc = kNC / products;
  const int64_t kt = max(1, p.splits);
  const int64_t k_slice = round_up(ceil_div(p.k, kt), 64 * E::kStep);
  const int64_t kb = round_up(ceil_div(k_slice, max(1, ceil_div(k_slice, kblock))), 16 * E::kStep);
  const bool one_block = k_slice <= kb;
  const int64_t per_total = max(1, kTotalCells<E> * E::kStep / max(kb, 1));
  // tiles that share a B block need all of it at once; a B block of few cells may be wider
  const int64_t widest =
      one_block ? min(most_nc, max(kNB, kKC<E> * kNB / ceil_div(max(k_slice, 1), E::kStep) / nr * nr)) : most_nc;
  const int64_t highest = one_block || p.m <= (kSharedTiles - 1) * kMC || p.n < kLowColumns ? kMC : kLowMC;
  Tiling best{};
  int64_t best_cost = -1;
  for (int64_t mt = ceil_div(p.m, highest), mtries = 0; mtries < 4; ++mt, ++mtries) {
    for (int64_t nt = ceil_div(p.n, widest), ntries = 0; ntries < 4; ++nt, ++ntries) {
      const int64_t mc = min(highest, round_up(ceil_div(p.m, mt), mt > 1 ? kMR : 1));
      const int64_t nc = min(widest, round_up(ceil_div(p.n, nt), nr));
      const int64_t tasks = ceil_div(p.m, mc) * ceil_div(p.n, nc) * kt;
      const int64_t rounds = ceil_div(tasks, threads);
      // per step of k: mc·nc/lanes FMAs, and about one cycle per packed register of either operand
      const int64_t cost = rounds * (products * mc * round_up(nc, E::kVL) + 16 * (mc + products * nc));
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        best = {mc,
                nc,
                one_block ? nc : min(nc, kNB),
                ceil_div(p.m, mc),
                ceil_div(p.n, nc),
                k_slice,
                kt,
                max(kb, 1),
                one_block,
                per_total,
                p.m == 1 || p.n == 1 ? kVectorSum<E> : kKC<E>,
                products};
      }
    }
  }
  return best;
}

// ---- packing ----------------------------------------------------------------------------------------------------

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
  ColumnSum<E> row_sum;            // [kMC], the sums of the rows of A
  typename E::Packed* row_buffer;  // rows on their way into a panel
  double* total;                   // the total of the tile's sums, if it has several

  static constexpr int64_t kRowBuffer = (kMC > kNC ? kMC : kNC) + DLK_VBYTES;
  static constexpr int64_t kA = kMC * kAStride<E>;
  // a wide block of few cells has as many panel gaps as it has registers of columns
  static constexpr int64_t kB = kKC<E> * (kNB + kNV * E::kVL) + kNC / E::kVL * kPanelGap<E>;
  static constexpr int64_t kAcc = kMC * (kNC + kNV * E::kVL);

  static Buffers get(bool has_totals, bool two_products) {
    constexpr int64_t bytes = sizeof(Cell) * (kA + kB) + sizeof(typename E::Acc) * kAcc +
                              sizeof(Cell) * 3 * kRowBuffer + (sizeof(double) + sizeof(typename E::Acc)) * kRowBuffer;
    const int64_t totals = has_totals ? sizeof(double) * kAcc : 0;
    char* at = (char*)scratch(bytes + totals + (two_products ? sizeof(Cell) * kB : 0));
    Buffers s;
    s.a = (Cell*)at;
    s.b = s.a + kA;
    s.acc = (typename E::Acc*)(s.b + kB);
    s.row_buffer = (typename E::Packed*)(s.acc + kAcc);
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
  const int64_t cells = cells_of<E>(ks);
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
    if constexpr (E::kDepth > 1)
      E::pack_k_step(out, line, q, rows);
    else
      for (int64_t i = 0; i < rows; i += kMR) copy_panel_row<E>(out + panel_at<E>(i, kMR, cells) + q * kMR, line + i);
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

// ---- one tile ---------------------------------------------------------------------------------------------------

template <class E>
struct GemmCall {
  const Gemm* p;
  Tiling t;
  int64_t b_cells;  // of a B block in p->panels
  bool b_in_place;  // whole panels of B are read where they lie
  bool c_in_place;  // the sums are C: there is no epilogue to run
  RowSource<E> a;
  AOrder order;
  EpilogueFn<typename E::ElemC> epilogue;
  GluEpilogueFn<typename E::ElemC> glu;  // of two products; nullptr: there is one
};

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
  const char *next, *next_end;      // the shared B block that is multiplied next, or nullptr
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

// Return whether whole panels of B may be read where they lie, which saves packing them: their rows are cells, few rows
// of A read them, and the pitch does not put the rows of a block in so few sets of L2 that they drive each other out.
// A second B lies like the first.
template <class E>
bool reads_b_in_place(const Gemm& p) {
  constexpr int64_t few = 4 * kMR, bad_pitch = 8192 / sizeof(typename E::Cell);
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

// Multiply the packed A block and the B block into acc. After the last k block of a sum, add it to the total;
// after the last sum, run the epilogue or store partial sums.
template <class E>
void multiply_block(const GemmCall<E>& call, const Block<E>& at, const typename E::Cell* block_a,
                    const typename E::Cell* block_b, typename E::Acc* acc, int64_t ld) {
  using A = typename E::Acc;
  constexpr int64_t nr = kNV * E::kVL;
  const Gemm& p = *call.p;
  const int64_t padded = round_up(at.cols, E::kVL);
  const bool row_major = call.order == kRowMajor || E::kDepth > 1;
  const char* next = at.next;
  // With one k block all micro-tiles use the same accumulators, which stay in L1.
  const bool one_block = at.first && at.last && !call.glu;
  for (int64_t i = 0; i < at.rows; i += kMR) {
    const int64_t r = min(kMR, at.rows - i);
    const auto* panel_a = block_a + (row_major ? i * kAStride<E> : panel_at<E>(i, kMR, at.cells));
    for (int64_t j = 0; j < padded; j += nr) {
      const int64_t width = min(nr, padded - j);
      const bool in_place = at.b_there && j + nr <= at.cols;
      const auto* panel_b = in_place ? at.b_there + j : block_b + panel_at<E>(j, nr, at.cells);
      const int64_t ldb = in_place ? p.b.row_stride : width;
      const int64_t micro_tile = i * ld + j * kMR;
      const int64_t n = min(width, at.cols - j);
      const bool c_in_place = call.c_in_place && one_block && !at.total && n == width;
      A* c = one_block ? acc : acc + micro_tile;
      int64_t ldc = nr;
      if (c_in_place) c = (A*)p.c + (at.i0 + i) * p.n + at.j0 + j, ldc = p.n;
      using M = typename E::Multiply;
      const auto uk = row_major ? ukernel_for<M, kRowMajor>(r, width / E::kVL, next)
                                : ukernel_for<M, kKMajor>(r, width / E::kVL, next);
      for (int64_t q = 0; q == 0 || q < at.cells; q += call.t.per_sum) {
        const int64_t cells = min(call.t.per_sum, at.cells - q);
        uk(cells, panel_a + q * (row_major ? 1 : kMR), panel_b + q * ldb, ldb, c, ldc, !at.first || q > 0, next);
        if (next && (next += ceil_div(cells, kStepsPerLine) * 64) >= at.next_end) next = nullptr;
      }
      if (!at.last || c_in_place) continue;
      if (at.total) add_to_total(c, nr, at.total + micro_tile, nr, r, width, at.first_sum, at.last_sum);
      if (!at.last_sum || at.waits) continue;
      if (call.glu) {
        call.glu(p, c - kUpAt, c, nr, at.i0 + i, at.j0 + j, r, n);
      } else if (call.t.kt == 1) {
        call.epilogue(p, c, nr, at.i0 + i, at.j0 + j, r, n);
      } else {
        A* part = (A*)p.partials + (at.tk * p.m + at.i0 + i) * p.n + at.j0 + j;
        for (int64_t x = 0; x < r; ++x)
          for (int64_t y = 0; y < n; ++y) part[x * p.n + y] = c[x * nr + y];
      }
    }
  }
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

// Run one task: a tile of C over one k-slice.
template <class E>
void run_tile(const GemmCall<E>& call, int64_t ti, int64_t tj, int64_t tk, Buffers<E>& s, PackedBlockKey& a,
              PackedBlockKey (&packed_b)[2]) {
  using A = typename E::Acc;
  constexpr int64_t nr = kNV * E::kVL;
  const Gemm& p = *call.p;
  const Tiling& t = call.t;
  const int64_t i0 = ti * t.mc, rows = min(t.mc, p.m - i0);
  const int64_t j0 = tj * t.nc, cols = min(t.nc, p.n - j0);
  const int64_t k0 = min(tk * t.k_slice, p.k), k1 = min(k0 + t.k_slice, p.k);
  const bool sum_rows = p.row_sum && tj == 0;
  if (sum_rows) s.row_sum.clear(rows);

  for (int64_t p0 = k0; p0 < k1 || p0 == k0; p0 += t.kb) {  // with an empty k the tile is still written
    const int64_t ks = min(t.kb, k1 - p0), k_block = (p0 - k0) / t.kb, in_sum = k_block % t.per_total;
    const bool last = p0 + t.kb >= k1;
    const bool new_a = a.move_to(i0, p0) || sum_rows;
    if (new_a && call.order == kRowMajor)
      pack_a_rows<E>(call.a, s.a, i0, rows, p0, ks);
    else if (new_a)
      pack_a_cols<E>(call.a, s.a, i0, rows, p0, ks, s.row_buffer, sum_rows ? &s.row_sum : nullptr);
    for (int64_t jb = 0; jb < cols; jb += t.nb) {
      const int64_t width = min(t.nb, cols - jb);
      const int64_t shared = p.panels ? t.b_block(tk, k_block, tj, jb / t.nb) : 0;
      for (int64_t product = 0; product < t.products; ++product) {
        const bool is_up = product == 1, more_products = product + 1 < t.products, more_columns = jb + t.nb < cols;
        const View& b = is_up ? p.b_up : p.b;
        auto* const own_b = is_up ? s.b_up : s.b;
        const auto* block_b = own_b;
        if (p.panels)
          block_b = shared_block(call, product * t.b_blocks() + shared);
        else if (const int64_t there = call.b_in_place ? width / nr * nr : 0;
                 there < width && packed_b[product].move_to(j0 + jb, p0))
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
                       more_products,
                       nullptr,
                       nullptr,
                       nullptr};
        if (call.b_in_place) at.b_there = (const typename E::Cell*)b.data + p0 * b.row_stride + j0 + jb;
        if (p.panels && (more_products || more_columns || !last)) {
          const int64_t following = more_products  ? (product + 1) * t.b_blocks() + shared
                                    : more_columns ? shared + 1
                                                   : t.b_block(tk, k_block + 1, tj, 0);
          at.next = (const char*)shared_block(call, following);
          at.next_end = at.next + call.b_cells * sizeof(typename E::Cell);
        }
        multiply_block<E>(call, at, s.a, block_b, s.acc + sums, round_up(cols, nr));
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
int64_t panels_size(const Gemm& p, int threads) {
  const Tiling t = tile<E>(p, threads);
  return t.mt < kSharedTiles ? 0 : t.products * t.b_blocks() * b_block_cells<E>(t) * sizeof(typename E::Cell);
}

template <class E>
void gemm_with(const Gemm& p, const Parallel& parallel) {
  using C = typename E::ElemC;
  // dzᵀ is contiguous along its rows. All other operands are read along k.
  const bool k_major = p.a.row_stride == 1 && p.a.col_stride != 1;
  const AOrder order = k_major || p.row_sum ? kKMajor : kRowMajor;
  const Tiling t = tile<E>(p, parallel.threads);
  const GemmCall<E> call = {&p,
                            t,
                            b_block_cells<E>(t),
                            reads_b_in_place<E>(p),
                            stores_sums<E>(p),
                            RowSource<E>::of(p.a, p.saved, p.act),
                            order,
                            epilogue_of<C, typename E::ElemB>(p),
                            glu_epilogue_of<C, typename E::ElemB>(p)};
  if (p.panels)
    parallel.run(t.products * t.b_blocks(), &call, [](const void* context, int64_t begin, int64_t end) {
      auto buffers = Buffers<E>::get(false, false);
      for (int64_t block = begin; block < end; ++block)
        pack_shared_block<E>(*(const GemmCall<E>*)context, block, buffers);
    });
  parallel.run(call.t.tasks(), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const GemmCall<E>*)context;
    const Tiling& t = call.t;
    auto buffers = Buffers<E>::get(t.has_totals(), t.products == 2);
    [[maybe_unused]] const typename E::Scope scope;
    PackedBlockKey a, b[2];
    // With one k block the next task is the tile below, which shares the B block. With several it is the tile to the
    // right, which shares A in L3.
    const bool down = t.one_block;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tk = task / (t.mt * t.nt), c = task % (t.mt * t.nt);
      const int64_t ti = down ? c % t.mt : c / t.nt, tj = down ? c / t.mt : c % t.nt;
      run_tile<E>(call, ti, tj, tk, buffers, a, b);
    }
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
