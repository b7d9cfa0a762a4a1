// The three products where out_features is small. They read memory directly and pack nothing. x is read once in forward
// and once in backward, and dx is written once. The few rows of weight, and the few values of dz in a row, stay in L1.
//
//   forward   dot products of rows of x and rows of weight, kDots of them at a time
//   backward  makes a block of rows of dz, and from it, stripe by stripe of columns of x:
//               dgrad  rows of weight, scaled and added up
//               wgrad  outer products, summed in registers over the block
//
// A stripe is kStripe registers wide. Sums over rows are cut after every block and after every kSumRows rows, and the
// parts of kSumRows rows are added in f64. Slices of rows, cut by the shape alone, are added in order.
namespace dlk::cpu::DLK_ISA {

constexpr int kDots = kF32Lanes;  // accumulators: as many as one or two calls of row_sums reduce
constexpr int64_t kRowBlock = 64;
constexpr int64_t kSumRows = 256;
constexpr int kStripe = DLK_VBYTES == 64 ? 4 : 2;
constexpr int kStripeSums = 4 * kStripe;   // accumulators of a stripe: half of the register file
constexpr int64_t kStripedCols = 1 << 10;  // columns of a task: 16 rows of sums in f32 and f64 take 192 KiB of L2

// ---- forward -------------------------------------------------------------------------------------------------------

struct PrefetchRows {
  int64_t begin = 0, end = 0;  // rows of A to prefetch
};

// out[R, C] = rows i0.. of A · columns j0.. of B. Meanwhile the rows `ahead` are prefetched.
template <class E, int R, int C>
DLK_INLINE void column_dots(const Gemm& p, int64_t i0, int64_t j0, typename E::Acc* out, int64_t ld,
                            PrefetchRows ahead) {
  using V = typename E::V;
  constexpr int64_t span = E::kVL * E::kStep;
  constexpr int kCount = R * C, kSums = round_up(kCount, E::kVL);
  const auto* x = (const typename E::Elem*)p.a.data + i0 * p.a.row_stride;
  const auto* w = (const typename E::ElemB*)p.b.data + j0 * p.b.col_stride;
  typename E::Acc sums[kSums];
  double total[kCount] = {};
  const auto* rows_ahead = (const typename E::Elem*)p.a.data;
  for (int64_t k = 0, k0 = 0; k0 < p.k; k0 += kDotSums * span) {
    const int64_t k1 = min(k0 + kDotSums * span, p.k);
    V acc[kSums] = {};
    const auto step = [&](int64_t n) DLK_INLINED {
      V wv[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) wv[j] = E::load_cells(w + j * p.b.col_stride + k, n);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const V xv = E::load_cells(x + i * p.a.row_stride + k, n);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) acc[i * C + j] = E::multiply_add(acc[i * C + j], xv, wv[j]);
      }
    };
    for (; k + span <= k1; k += span) {
      for (int64_t i = ahead.begin; i < ahead.end; ++i) __builtin_prefetch(rows_ahead + i * p.a.row_stride + k);
      step(span);
    }
    if (k < k1) step(p.k - k);
    reduce_dots<E, kCount>(acc, sums, total, p.k > kDotSums * span, k0 == 0, k1 == p.k);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) out[i * ld + j] = sums[i * C + j];
}

// The dot products of kDots rows (or fewer, at the end) and C columns. Each call prefetches its share of the next kDots
// rows, because no hardware prefetcher keeps up with several short streams.
template <class E, int C>
DLK_INLINE void dots_of_rows(const Gemm& p, int64_t i0, int64_t rows, int64_t j0, typename E::Acc* out) {
  constexpr int R = kDots / C;
  const int64_t next = i0 + kDots, last = max(p.m - next, 0);
  int64_t i = 0;
  for (; i + R <= rows; i += R) {
    const int64_t call = j0 + i / R;  // out of p.n calls
    const PrefetchRows ahead = {next + min(call * kDots / p.n, last), next + min((call + 1) * kDots / p.n, last)};
    column_dots<E, R, C>(p, i0 + i, j0, out + i * p.n + j0, p.n, ahead);
  }
  for (; i < rows; ++i) column_dots<E, 1, C>(p, i0 + i, j0, out + i * p.n + j0, p.n, {});
}

template <class E>
struct ColumnsForward {
  const Gemm* p;
  Gemm flat;  // p as the epilogue sees it: rows of n * kVL columns
  EpilogueFn<typename E::ElemC> epilogue;
};

template <class E>
void few_columns_forward_with(const Gemm& p, const Parallel& parallel) {
  // A row of y is shorter than a register. So kVL rows are one row for the epilogue, n registers long; the bias is
  // repeated.
  ColumnsForward<E> call = {&p, p, epilogue_of<typename E::ElemC, typename E::ElemB>(p)};
  typename E::ElemB bias[kFewColumns * E::kVL];
  call.flat.n = p.n * E::kVL;
  for (int64_t j = 0; p.bias && j < call.flat.n; ++j) bias[j] = ((const typename E::ElemB*)p.bias)[j % p.n];
  if (p.bias) call.flat.bias = bias;
  parallel.run(ceil_div(p.m, kRowBlock), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const ColumnsForward<E>*)context;
    const Gemm &p = *call.p, &flat = call.flat;
    typename E::Acc acc[kRowBlock * kFewColumns + E::kVL];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i0 = block * kRowBlock, rows = min(kRowBlock, p.m - i0);
      for (int64_t i = 0; i < rows; i += kDots) {  // these rows stay in L1 for all columns
        const int64_t count = min(kDots, rows - i);
        int64_t j = 0;
        for (; j + 4 <= p.n; j += 4) dots_of_rows<E, 4>(p, i0 + i, count, j, acc + i * p.n);
        if (p.n & 2) dots_of_rows<E, 2>(p, i0 + i, count, j, acc + i * p.n), j += 2;
        if (p.n & 1) dots_of_rows<E, 1>(p, i0 + i, count, j, acc + i * p.n);
      }
      const int64_t whole = rows / E::kVL, rest = rows % E::kVL;
      call.epilogue(flat, acc, flat.n, i0 / E::kVL, 0, whole, flat.n);
      if (rest) call.epilogue(flat, acc + whole * flat.n, flat.n, i0 / E::kVL + whole, 0, 1, rest * p.n);
    }
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Makes rows of dz, one directly behind the other. Where the rows of g and of saved also follow each other without a
// gap, several rows are made as one.
template <class E>
struct DzRows {
  RowSource<E> source;
  int64_t n;
  bool flat;

  static bool flatten(View& v, int64_t n) {
    const bool gapless = n == 1 || v.row_stride == n * v.col_stride;
    if (gapless) v = {v.data, 0, n == 1 ? v.row_stride : v.col_stride};
    return gapless;
  }
  static DzRows of(const ColumnsBackward& p) {
    View g = p.g, saved = p.saved;
    const bool flat = flatten(g, p.n) && flatten(saved, p.n);
    return {flat ? RowSource<E>::of(g, saved, p.act) : RowSource<E>::of(p.g, p.saved, p.act), p.n, flat};
  }
  void make(typename E::Packed* dz, int64_t i0, int64_t rows) const {
    if (flat) return RowSource<E>::along_row(source, dz, 0, i0 * n, rows * n);
    for (int64_t i = 0; i < rows; ++i) RowSource<E>::along_row(source, dz + i * n, i0 + i, 0, n);
  }
};

// Load V registers of a row, of which `cols` elements are valid.
template <class T, int V>
DLK_INLINE void load_stripe(const T* row, int64_t cols, Vec<Acc<T>> (&out)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) out[v] = load_partial(row + v * kLanes<T>, 1, cols - v * kLanes<T>);
}
// sum += scale · row
template <class Register, int V, class A>
DLK_INLINE void add_scaled(Register (&sum)[V], A scale, const Register (&row)[V]) {
  const auto factor = broadcast(scale);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = fma(row[v], factor, sum[v]);
}

// dx[R, cols] = dz[R, n] · weight[n, cols]; cols is at most V registers. `ahead`: rows of dx to prefetch, or nullptr.
template <class T, int R, int V>
DLK_INLINE void scaled_rows(const Acc<T>* dz, int64_t n, const T* w, int64_t w_stride, T* dx, int64_t dx_stride,
                            int64_t cols, const T* ahead) {
#pragma GCC unroll 8
  for (int r = 0; ahead && r < R; ++r) prefetch_lines(ahead + r * dx_stride, V * kLanes<T> * sizeof(T));
  Vec<Acc<T>> acc[R][V] = {};
  for (int64_t j = 0; j < n; ++j) {
    Vec<Acc<T>> wv[V];
    load_stripe<T, V>(w + j * w_stride, cols, wv);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) add_scaled(acc[r], dz[r * n + j], wv);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_partial(dx + r * dx_stride + v * kLanes<T>, acc[r][v], cols - v * kLanes<T>);
}

// sums[N, cols] += dz[rows, N]ᵀ · x[rows, cols]. U neighbouring rows have accumulators of their own. `ahead`: rows of x
// to prefetch, or nullptr.
template <class T, int N, int V>
DLK_INLINE void outer_products(const Acc<T>* dz, int64_t n, const T* x, int64_t x_stride, int64_t rows, int64_t cols,
                               Acc<T>* sums, int64_t pitch, const T* ahead) {
  constexpr int U = kStripeSums / (N * V) < 4 ? kStripeSums / (N * V) : 4;
  Vec<Acc<T>> acc[U][N][V] = {};
  const auto add = [&](int64_t i, Vec<Acc<T>>(&to)[N][V]) DLK_INLINED {
    if (ahead) prefetch_lines(ahead + i * x_stride, V * kLanes<T> * sizeof(T));
    Vec<Acc<T>> xv[V];
    load_stripe<T, V>(x + i * x_stride, cols, xv);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) add_scaled(to[j], dz[i * n + j], xv);
  };
  int64_t i = 0;
  for (; i + U <= rows; i += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) add(i + u, acc[u]);
  for (; i < rows; ++i) add(i, acc[0]);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) acc[0][j][v] += acc[u][j][v];
      auto* at = sums + j * pitch + v * kLanes<T>;
      store(at, load(at) + acc[0][j][v]);
    }
}

// The stripe that comes next, which is prefetched: no hardware prefetcher follows the short rows of stripes.
struct NextStripe {
  int64_t i, j;
  bool exists;
};

// The backward of one stripe: rows i0.. and columns j0.. of x, at most V registers wide. Writes dx and adds to sums,
// where these are set.
template <class T, int V>
DLK_INLINE void backward_stripe(const ColumnsBackward& p, const Acc<T>* dz, int64_t i0, int64_t rows, int64_t j0,
                                int64_t cols, Acc<T>* sums, int64_t pitch, NextStripe next) {
  const int64_t n = p.n;
  if (p.dx) {
    constexpr int R = V == 1 ? 8 : 4;
    const T* w = (const T*)p.weight.data + j0;
    T* dx = (T*)p.dx + i0 * p.k + j0;
    const T* ahead = next.exists ? (T*)p.dx + next.i * p.k + next.j : nullptr;
    int64_t i = 0;
    for (; i + R <= rows; i += R)
      scaled_rows<T, R, V>(dz + i * n, n, w, p.weight.row_stride, dx + i * p.k, p.k, cols,
                           ahead ? ahead + i * p.k : nullptr);
    for (; i < rows; ++i) scaled_rows<T, 1, V>(dz + i * n, n, w, p.weight.row_stride, dx + i * p.k, p.k, cols, nullptr);
  }
  if (!sums) return;
  const T* x = (const T*)p.x.data + i0 * p.x.row_stride + j0;
  const T* ahead = next.exists ? (const T*)p.x.data + next.i * p.x.row_stride + next.j : nullptr;
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    outer_products<T, 4, V>(dz + j, n, x, p.x.row_stride, rows, cols, sums + j * pitch, pitch,
                            j == 0 ? ahead : nullptr);
  if (n & 2)
    outer_products<T, 2, V>(dz + j, n, x, p.x.row_stride, rows, cols, sums + j * pitch, pitch,
                            j == 0 ? ahead : nullptr),
        j += 2;
  if (n & 1)
    outer_products<T, 1, V>(dz + j, n, x, p.x.row_stride, rows, cols, sums + j * pitch, pitch,
                            j == 0 ? ahead : nullptr);
}

// Run one task: columns j0 .. j0 + cols of x, over one slice of rows. The sums go to dweight and dbias, rounded to T, or
// are partials of several slices.
template <class T>
void backward_columns(const ColumnsBackward& p, const DzRows<Convert<T>>& source, int64_t i0, int64_t i1, int64_t j0,
                      int64_t cols, void* dweight, void* dbias, bool are_partials) {
  using A = Acc<T>;
  constexpr int64_t wide = kStripe * kLanes<T>;
  // Where rows are 1 KiB apart, the 64 rows of a stripe would share 16 sets of L1 and not fit.
  const int64_t block = p.k > 2 * wide ? kRowBlock / 2 : kRowBlock;
  const int64_t pitch = round_up(cols, kLanes<T>), bias_width = p.n * kLanes<T>;
  auto* total = (double*)scratch((sizeof(double) + sizeof(A)) * p.n * pitch);
  auto* sums = dweight ? (A*)(total + p.n * pitch) : nullptr;
  A dz[kRowBlock * kFewColumns + kLanes<T>], bias_block[kFewColumns * kLanes<T>];
  double bias_total[kFewColumns * kLanes<T>];
  ColumnSum<Convert<T>> bias{bias_total, bias_block};  // kLanes rows are one row of it
  bias.clear(bias_width);
  // The stripe to the right, or the first one of the next block.
  const auto next = [&](int64_t i, int64_t j) -> NextStripe {
    if (j < cols) return {i, j0 + j, true};
    return {i + block, j0, i + block < i1};
  };
  for (int64_t k0 = i0; k0 < i1; k0 += kSumRows) {
    const int64_t k1 = min(k0 + kSumRows, i1);
    if (sums) __builtin_memset(sums, 0, sizeof(A) * p.n * pitch);
    for (int64_t i = k0; i < k1; i += block) {
      const int64_t rows = min(block, k1 - i);
      source.make(dz, i, rows);
      if (dbias)
        for (int64_t at = 0; at < rows * p.n; at += bias_width) bias.add(dz + at, min(bias_width, rows * p.n - at));
      int64_t j = 0;
      for (; j + wide <= cols; j += wide)
        backward_stripe<T, kStripe>(p, dz, i, rows, j0 + j, wide, sums ? sums + j : nullptr, pitch, next(i, j + wide));
      for (; j < cols; j += kLanes<T>)
        backward_stripe<T, 1>(p, dz, i, rows, j0 + j, min(kLanes<T>, cols - j), sums ? sums + j : nullptr, pitch,
                              next(i, j + kLanes<T>));
    }
    if (sums && i1 - i0 > kSumRows) add_to_total(sums, pitch, total, pitch, p.n, cols, k0 == i0, k1 == i1);
  }
  if (dbias) {
    bias.flush(bias_width);
    for (int64_t at = p.n; at < bias_width; ++at) bias_total[at % p.n] += bias_total[at];
  }
  const auto store_sums = [&](auto* to_weight, auto* to_bias) {
    for (int64_t n = 0; to_weight && n < p.n; ++n) store_row(to_weight + n * p.k + j0, sums + n * pitch, cols);
    if (to_bias) bias.store(to_bias, p.n);
  };
  if (are_partials) return store_sums((A*)dweight, (A*)dbias);
  store_sums((T*)dweight, (T*)dbias);
}

template <class T>
struct ColumnsCall {
  const ColumnsBackward* p;
  DzRows<Convert<T>> dz;
};

template <class T>
void few_columns_backward_with(const ColumnsBackward& p, const Parallel& parallel) {
  const ColumnsCall<T> call = {&p, DzRows<Convert<T>>::of(p)};
  const int64_t count = column_slices(p.m);
  parallel.run(count * ceil_div(p.k, kStripedCols), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const ColumnsCall<T>*)context;
    const ColumnsBackward& p = *call.p;
    constexpr int64_t step = kDots;  // a slice begins at a multiple of kDots rows
    const int64_t count = column_slices(p.m), panels = ceil_div(p.k, kStripedCols), steps = ceil_div(p.m, step);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / panels, j0 = task % panels * kStripedCols, cols = min(kStripedCols, p.k - j0);
      const int64_t i0 = slice * steps / count * step, i1 = min((slice + 1) * steps / count * step, p.m);
      const bool sum_bias = p.dbias && j0 == 0;
      if (count == 1) {
        backward_columns<T>(p, call.dz, i0, i1, j0, cols, p.dweight, sum_bias ? p.dbias : nullptr, false);
      } else {
        auto* part = (Acc<T>*)p.partials + slice * p.n * (p.k + 1);
        backward_columns<T>(p, call.dz, i0, i1, j0, cols, p.dweight ? part : nullptr,
                            sum_bias ? part + p.n * p.k : nullptr, true);
      }
    }
  });
  if (count == 1) return;
  const int64_t chunk = 4096, pitch = p.n * (p.k + 1);
  if (p.dweight)
    parallel.run(ceil_div(p.n * p.k, chunk), &p, [](const void* context, int64_t begin, int64_t end) {
      const auto& p = *(const ColumnsBackward*)context;
      sum_slices<T>((const Acc<T>*)p.partials, column_slices(p.m), p.n * (p.k + 1), (T*)p.dweight, begin * chunk,
                    min(end * chunk, p.n * p.k));
    });
  if (p.dbias) sum_slices<T>((const Acc<T>*)p.partials + p.n * p.k, count, pitch, (T*)p.dbias, 0, p.n);
}

}  // namespace dlk::cpu::DLK_ISA
