// The micro-kernel: a micro-tile of R rows × C registers of C stays in registers while k runs.
//
// DLK_MR rows and DLK_NV registers fill the register file. In AVX-512, 14 × 2 accumulators + 2 registers of B + 1
// broadcast are 31 of 32. A k step is R·C FMAs for C loads of B and R broadcasts of A: with 14 × 2, 28 FMAs for 16
// loads.
namespace dlk::cpu::DLK_ISA {

constexpr int64_t kMR = DLK_MR;
constexpr int64_t kNV = DLK_NV;
// The cells along k of a block, and of a running sum within it. In f32 that is 256, where MKL cuts its sums too. An A
// micro-panel of kMR × kKC cells takes about half of a 32 KiB L1. AMX has more than twice as many rows, so its panels
// are half as deep.
template <class E>
constexpr int64_t kKC = (E::kDepth > 1 ? 512 : 1024) / sizeof(typename E::Cell);
// The cells along k of one sum of a tile. Longer k has several such sums, which are added in f64. Added in f32 they
// would err like sqrt(k / 64) again, which at k = 65536 was 5 times torch's error. A tile instruction of AMX adds to
// one sum over all of k, so its sums are shorter.
template <class E>
constexpr int64_t kTotalCells = (E::kDepth > 1 ? 8 : 16) * kKC<E>;
// The cells of a running sum where C is a vector. A library adds up a dot product lane by lane there, which errs less
// than one long running sum.
template <class E>
constexpr int64_t kVectorSum = E::kDepth > 1 ? kKC<E> : 16;
// How many k steps before their use cells of B are prefetched. The panel streams from L2, and no hardware prefetcher
// follows from one panel to the next. AVX-512's micro-kernel gained 5 % from it on a Xeon with 2 MiB of L2.
constexpr int64_t kStepsAhead = 8;
// In how many k steps a micro-kernel prefetches one cache line of the block that comes next. It goes to L2: a shared
// block lies in L3, whose latency is longer than the prefetch above reaches.
constexpr int64_t kStepsPerLine = 4;
// The k steps of one turn of a micro-kernel's loop. A step of AVX2 has 12 FMAs in 22 instructions, so that the loop's own three
// matter where another hyperthread takes half of the slots: there Zen 3 ran at 57 to 75 % of its speed alone, unrolled at 80.
constexpr int64_t kUnrolled = kMR == 6 ? kStepsPerLine : 1;
// The k steps that end before the memory of C is there to be written. wgrad of 16 rows at 512→1024 to 1376 took 1.35 of its time
// without prefetching it, of 32 rows 1.14, of 64 rows 1.01 (a Xeon with 2 MiB of L2, two threads).
constexpr int64_t kShortSum = 64;
// The row stride of a row-major A panel, in cells: one cache line more than a row of the block, so that rows do not
// share an L1 set.
template <class E>
constexpr int64_t kAStride = kKC<E> + 64 / sizeof(typename E::Cell);

// The order of an A panel. It follows the direction in which A is contiguous in memory: rows along k (x, dz), or k
// along rows (dzᵀ). kInPlace: A is not packed. It is a block of rows of pitch kAStride, and k runs down the rows (dzᵀ
// of a fused MLP).
enum AOrder { kRowMajor, kKMajor, kInPlace };

template <int written = 0>
DLK_INLINE void prefetch_lines(const void* p, int64_t bytes) {
#pragma GCC unroll 4
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)p + at, written);
}

// Prefetch the sums that a micro-kernel adds to at its end, or writes there.
template <class E, int R, int C, int written = 0>
DLK_INLINE void prefetch_tile(const typename E::Acc* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) prefetch_lines<written>(c + i * ldc, C * DLK_VBYTES);
}

// Memory that is read soon: rows of whole cache lines, of which the first `left` lines begin at `at`. The next row begins
// `jump` bytes behind the end of its predecessor, and has `per_row` lines.
struct LinesAhead {
  const char* at;
  int64_t left, per_row, jump;
};

// acc[R, C registers] = a · b over `cells` cells along k. ldb is in cells. kNext: on the way prefetch `next`,
// one line in kStepsPerLine steps. It costs 4 % where nothing is gained.
template <class E, AOrder order, int R, int C, bool kNext>
DLK_INLINE void multiply_panels(int64_t cells, const typename E::Cell* a, const typename E::Cell* b, int64_t ldb,
                                typename E::V (&acc)[R][C], [[maybe_unused]] const LinesAhead* next) {
  using V = typename E::V;
  constexpr int64_t row = order == kRowMajor ? kAStride<E> : 1;
  constexpr int64_t step = order == kRowMajor ? 1 : order == kKMajor ? kMR : kAStride<E>;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[i][j] = V{};
  [[maybe_unused]] LinesAhead lines;
  if constexpr (kNext) lines = *next;
  const auto k_step = [&](const typename E::Cell* a, const typename E::Cell* b) __attribute__((always_inline)) {
    prefetch_lines(b + kStepsAhead * ldb, C * DLK_VBYTES);
    V bv[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) bv[j] = load_bits<V>(b + j * E::kVL);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[i][j] = E::multiply_add(acc[i][j], a[i * row], bv[j]);
  };
  int64_t p = 0;
#pragma GCC unroll 1
  for (; p + kUnrolled <= cells; p += kUnrolled, a += kUnrolled * step, b += kUnrolled * ldb) {
    if constexpr (kNext)
      if (p % kStepsPerLine == 0) {
        prefetch_l2(lines.at), lines.at += 64;
        if (--lines.left == 0) lines.at += lines.jump, lines.left = lines.per_row;
      }
#pragma GCC unroll 4
    for (int u = 0; u < kUnrolled; ++u) k_step(a + u * step, b + u * ldb);
  }
  if constexpr (kUnrolled > 1)
#pragma GCC unroll 1
    for (; p < cells; ++p, a += step, b += ldb) k_step(a, b);
}

// c[R, C registers] = a · b, or c += a · b with `add`. ldc is in accumulators.
template <class E, AOrder order, int R, int C, bool kNext = false>
void ukernel(int64_t cells, const typename E::Cell* a, const typename E::Cell* b, int64_t ldb, typename E::Acc* c,
             int64_t ldc, bool add, const LinesAhead* next) {
  using V = typename E::V;
  if (add)
    prefetch_tile<E, R, C>(c, ldc);
  else if (ldc > C * E::kVL && cells <= kShortSum)  // C itself, and not accumulators, which are in L1
    prefetch_tile<E, R, C, /*written=*/1>(c, ldc);
  V acc[R][C];
  multiply_panels<E, order, R, C, kNext>(cells, a, b, ldb, acc, next);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      typename E::Acc* at = c + i * ldc + j * E::kVL;
      store_bits(at, add ? load_bits<V>(at) + acc[i][j] : acc[i][j]);
    }
}

// A whole micro-tile of C, and what its epilogue reads and writes beside it.
template <class T>
struct TileOfC {
  T* c;  // rows are `pitch` elements apart
  int64_t pitch;
  const T* bias = nullptr;         // of a forward, or nullptr
  const T* below_saved = nullptr;  // of a dgrad that makes dz of the layer below
  int64_t below_pitch = 0;         // between its rows
  T* copy = nullptr;               // receives C too, or nullptr
  int64_t copy_pitch = 0;
  double* column_sums = nullptr;  // the columns of dz are added to them, or nullptr

  // The micro-tile at row i and column j.
  static TileOfC of(const Gemm& p, int64_t i, int64_t j) {
    TileOfC tile{(T*)p.c + i * p.n + j, p.n};
    if (p.bias) tile.bias = (const T*)p.bias + j;
    if (p.below_saved) tile.below_saved = (const T*)p.below_saved + i * p.n + j, tile.below_pitch = p.n;
    return tile;
  }
};

// The sums of a micro-tile, with `add` on top of those at `sums`, which are kNV registers per row.
template <class E, bool kNext>
DLK_INLINE void whole_sums(int64_t cells, const typename E::Cell* a, const typename E::Cell* b, int64_t ldb,
                           const typename E::Acc* sums, bool add, const LinesAhead* next,
                           typename E::V (&acc)[kMR][kNV]) {
  constexpr int R = kMR, C = kNV;
  if (add) prefetch_tile<E, R, C>(sums, C * E::kVL);
  multiply_panels<E, kRowMajor, R, C, kNext>(cells, a, b, ldb, acc, next);
  if (!add) return;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[i][j] = load_bits<typename E::V>(sums + (i * C + j) * E::kVL) + acc[i][j];
}

template <class E, class T>
DLK_INLINE void store_tile(T* c, int64_t pitch, const typename E::V (&tile)[kMR][kNV]) {
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) store(c + i * pitch + j * E::kVL, tile[i][j]);
}

// C = act(a · b + bias). E are the Panels of its product, and T is the type of C.
template <class E, class T, class Act, bool kNext>
void ukernel_to_y(int64_t cells, const typename E::Cell* a, const typename E::Cell* b, int64_t ldb,
                  const typename E::Acc* sums, bool add, const LinesAhead* next, const TileOfC<T>& out) {
  using V = typename E::V;
  V acc[kMR][kNV], bias[kNV];
  whole_sums<E, kNext>(cells, a, b, ldb, sums, add, next, acc);
#pragma GCC unroll 4
  for (int j = 0; j < kNV; ++j) bias[j] = out.bias ? load(out.bias + j * E::kVL) : V{};
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) acc[i][j] = Act::template value<Ops<typename E::Acc>>(acc[i][j] + bias[j], V{});
  store_tile<E>(out.c, out.pitch, acc);
  if (out.copy) store_tile<E>(out.copy, out.copy_pitch, acc);
}

// C = (a · b) · act'(below_saved), the dz of the layer below.
template <class E, class T, class Act, bool kNext>
void ukernel_to_dz(int64_t cells, const typename E::Cell* a, const typename E::Cell* b, int64_t ldb,
                   const typename E::Acc* sums, bool add, const LinesAhead* next, const TileOfC<T>& out) {
  using V = typename E::V;
  V acc[kMR][kNV];
  whole_sums<E, kNext>(cells, a, b, ldb, sums, add, next, acc);
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j)
      acc[i][j] = Act::template grad<Ops<typename E::Acc>>(
          acc[i][j], load(out.below_saved + i * out.below_pitch + j * E::kVL), V{});
  store_tile<E>(out.c, out.pitch, acc);
  if (!out.column_sums) return;
  typename E::Acc lanes[kNV * E::kVL];
#pragma GCC unroll 4
  for (int j = 0; j < kNV; ++j) {
    V column{};
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i) column += acc[i][j];
    store(lanes + j * E::kVL, column);
  }
  for (int64_t c = 0; c < kNV * E::kVL; ++c) out.column_sums[c] += lanes[c];
}

template <class E>
using UkernelToC = void (*)(int64_t, const typename E::Cell*, const typename E::Cell*, int64_t, const typename E::Acc*,
                            bool, const LinesAhead*, const TileOfC<typename E::ElemC>&);

// A pair of these, without and with kNext, where the epilogue is a few instructions; elsewhere both are nullptr.
template <class E>
struct UkernelsToC {
  UkernelToC<E> plain, prefetching;

  using P = typename E::Panels;
  using T = typename E::ElemC;
  static constexpr bool kOneType = E::kDepth == 1 && kIsSame<typename E::ElemB, T>;

  static UkernelsToC to_y(Act act) {
    if constexpr (kOneType) {
      if (act == Act::none) return {&ukernel_to_y<P, T, Identity, false>, &ukernel_to_y<P, T, Identity, true>};
      if (act == Act::relu) return {&ukernel_to_y<P, T, ReLU, false>, &ukernel_to_y<P, T, ReLU, true>};
    }
    return {};
  }
  static UkernelsToC to_dz(Act below) {
    if constexpr (kOneType)
      if (below == Act::relu) return {&ukernel_to_dz<P, T, ReLU, false>, &ukernel_to_dz<P, T, ReLU, true>};
    return {};
  }
  // Those that can write C of this product.
  static UkernelsToC of(const Gemm& p) {
    if (p.splits > 1 || p.z || p.gated || p.output_mode != OutputMode::cast) return {};
    if (p.below_saved) return to_dz(p.below_act.kind);
    return to_y(p.saved.data ? Act::none : p.act.kind);  // in backward `act` belongs to dz
  }
};

template <class E>
using Ukernel = void (*)(int64_t, const typename E::Cell*, const typename E::Cell*, int64_t, typename E::Acc*, int64_t,
                         bool, const LinesAhead*);

// Return the micro-kernel for this many rows and registers. Every size of edge tile has its own, so that no row is
// computed that does not exist. `next`: whole micro-tiles prefetch the next block.
template <class E, AOrder order, int R = 1>
Ukernel<E> ukernel_for(int64_t rows, int64_t registers, bool next = false) {
  if constexpr (E::kDepth > 1) {
    return E::ukernel_for(rows, registers);
  } else {
    if constexpr (R < kMR) {
      if (rows > R) return ukernel_for<E, order, R + 1>(rows, registers, next);
    } else if constexpr (order != kInPlace) {
      if (next && registers == kNV) return &ukernel<E, order, R, int(kNV), true>;
    }
    using P = typename E::Panels;
    return registers == 1 ? &ukernel<P, order, R, 1> : &ukernel<P, order, R, int(kNV)>;
  }
}

}  // namespace dlk::cpu::DLK_ISA
