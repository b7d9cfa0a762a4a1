// How a product is cut: C in tiles, k in slices and blocks, and a block in micro-panels.
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
// Where A lies along its columns (dzᵀ of wgrad), a tile is higher, as long as it has no more than kTallSums elements. Each row of
// dz then gives more neighbours from one page. Measured on AVX2 alone, wgrad with dz in small pages, two threads, share of the
// peak: 82 to 87 % at 2048x2048x2048, 78 to 86 at 4096x768x3072, 79 to 85 at 4096x512x2048, 70 to 80 at 8192x256x1024.
constexpr int64_t kTallMC = (kMR == 6 ? 8 : 1) * kMC;
constexpr int64_t kTallSums = (kMR == 6 ? 4 : 1) * kMC * kNC;
// Where there are many tiles of several k blocks and many columns, they are at most this high. Half of the A block and of
// the accumulators leaves room in L2 for the next B block, and tiles twice as wide need A packed half as often. Measured
// on AVX-512 alone.
constexpr int64_t kLowMC = kMR == 14 ? kMC / 2 : kMC;
constexpr int64_t kLowColumns = 3 * kNB;
// B is read in place by at most so many rows of A: packing it would cost more than its rows, which lie apart in memory.
constexpr int64_t kInPlaceRows = 20 * kMR;
// From this many tiles above each other on, the tiles share one packed B. Two share it where it is small: a large one, which
// every tile reads from memory packed or not, costs its writing. Measured on AVX2 with 256 rows: shared at 784→256 1.04 times
// as fast, at 2048→2048 0.99.
constexpr int64_t kSharedTiles = 3;
constexpr int64_t kSharedByTwo = int64_t{1} << 20;  // elements of B

// Return the cells of a running sum. Where all of k is one sum it is cut in two: nothing averages its error, and
// libraries cut it on some processors. At 32, 200→130 the largest error was 1.7 times stock's on Zen 4, as one sum.
template <class E>
constexpr int64_t sum_cells(int64_t k) {
  constexpr bool rounds_less = kIsSame<typename E::Acc, typename E::ElemC>;  // else rounding C errs more
  return rounds_less && k <= kKC<E> ? kKC<E> / 2 : kKC<E>;
}

// How one product is cut in tiles, slices and blocks.
struct Tiling {
  int64_t nc;           // columns of a tile of C
  int64_t nb;           // columns of a B block
  int64_t mt, nt;       // tiles per direction
  int64_t k_slice, kt;  // k elements per slice, slices
  int64_t kb;           // k elements per k block; the blocks of a slice are equal
  int64_t per_total;    // k blocks per addition to the total
  int64_t per_sum;      // k cells per running sum
  int64_t products;     // 1; or 2, which share A and the epilogue
  bool tall;            // tiles may be higher than kMC
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
  // a B block of few cells may be wider
  const int64_t few_cells = kKC<E> * kNB / ceil_div(max(k_slice, 1), E::kStep) / nr * nr;
  const int64_t most_nb = one_block ? max(kNB, few_cells) : kNB;
  const int64_t highest = one_block || p.m <= 2 * kMC || p.n < kLowColumns ? kMC : kLowMC;
  const bool tall = kTallMC > kMC && p.a.row_stride == 1 && p.a.col_stride != 1 && !p.gated;
  Tiling best{};
  int64_t best_cost = -1;
  const auto consider = [&](int64_t mt, int64_t nt) {
    const int64_t nc = min(most_nc, round_up(ceil_div(p.n, nt), nr));
    const int64_t most_mc = tall ? max(highest, min(kTallMC, kTallSums / nc / kMR * kMR)) : highest;
    const int64_t mc = min(most_mc, round_up(ceil_div(p.m, mt), mt > 1 ? kMR : 1));
    const int64_t tasks = ceil_div(p.m, mc) * ceil_div(p.n, nc) * kt;
    const int64_t rounds = ceil_div(tasks, threads);
    // per step of k: mc·nc/lanes FMAs, and about one cycle per packed register of either operand; two of a tall A
    const int64_t cost = rounds * (products * mc * round_up(nc, E::kVL) + 16 * ((tall ? 2 : 1) * mc + products * nc));
    if (best_cost >= 0 && cost >= best_cost) return;
    best_cost = cost;
    best = {nc,
            min(nc, most_nb),
            ceil_div(p.m, mc),
            ceil_div(p.n, nc),
            k_slice,
            kt,
            max(kb, 1),
            per_total,
            p.m == 1 || p.n == 1 ? kVectorSum<E> : sum_cells<E>(min(k_slice, max(p.k, 1))),
            products,
            tall};
  };
  const int64_t least_mt = ceil_div(p.m, tall ? kTallMC : highest);
  const int64_t most_mt = min(ceil_div(p.m, highest), least_mt + 12) + 3;
  const int64_t least_nt = ceil_div(p.n, most_nc), most_nt = ceil_div(p.n, nr);
  for (int64_t mt = least_mt; mt <= most_mt; ++mt) {
    for (int64_t nt = least_nt; nt < least_nt + 4; ++nt) consider(mt, nt);
    // Many threads: one task, or two, for each of them.
    for (int64_t tasks = threads; tasks <= 2 * threads; tasks += threads)
      if (const int64_t nt = ceil_div(tasks, max(mt * kt, 1)); nt >= least_nt + 4) consider(mt, min(nt, most_nt));
  }
  return best;
}

}  // namespace dlk::cpu::DLK_ISA
