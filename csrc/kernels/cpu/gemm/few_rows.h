// The three products for few rows of x. They read memory directly and pack nothing; weight is read once, in memory
// order.
//
//   forward  (M <= 32)  dot products along k
//   dgrad    (M <= 8)   rows of weight scaled and added up
//   wgrad    (M <= 16)  outer products, written once
//
// forward multiplies blocks of DLK_DOT_M rows of x and DLK_DOT_N rows of w. Each pair of rows has its own accumulator
// register, so a loaded register of w serves every row of x. At the end row_sums adds up the lanes.
//
// Long sums are cut, and their parts are added in f64: along k after kDotSums registers, in dgrad after kRowSums rows.
namespace dlk::cpu::DLK_ISA {

constexpr int64_t kDotSums = 256;
constexpr int64_t kRowSums = 512;

// Add up the lanes of kCount accumulators: sums[i] is the sum of register i. A dot product that is cut in several parts
// is added up in total, and after its last part sums receives the total. Overwrites acc.
template <class E, int kCount>
DLK_INLINE void reduce_dots(typename E::V* acc, typename E::Acc* sums, double* total, bool several, bool first,
                            bool last) {
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i += E::kVL) store_bits(sums + i, row_sums(acc + i));
  if (several) add_to_total(sums, kCount, total, kCount, 1, kCount, first, last);
}

// out[R, C] = rows i0.. of x · rows j0.. of weight.
template <class E, int R, int C>
void dot_block(const Gemm& p, int64_t i0, int64_t j0, typename E::Acc* out, int64_t ld) {
  using V = typename E::V;
  using A = typename E::Elem;
  using B = typename E::ElemB;
  constexpr int kCount = R * C, kSums = round_up(kCount, E::kVL);
  constexpr int64_t span = E::kVL * E::kStep;
  const A* x = (const A*)p.a.data + i0 * p.a.row_stride;
  const B* w = (const B*)p.b.data + j0 * p.b.col_stride;
  typename E::Acc sums[kSums];
  double total[kCount] = {};
  // The first block of rows of x prefetches the next rows of w, because no hardware prefetcher follows from one short
  // row to another. In f32 the first 128 elements of a row are enough: from there on the hardware prefetcher keeps up
  // with the products. In bf16 the products are twice as fast, so the whole row is prefetched.
  const int64_t prefetch_to = i0 > 0 ? 0 : E::kStep > 1 ? p.k : 128;
  for (int64_t k = 0, k0 = 0; k0 < p.k; k0 += kDotSums * span) {
    const int64_t k1 = min(k0 + kDotSums * span, p.k);
    V acc[kSums] = {};
    for (; k + span <= k1; k += span) {
      if (k < prefetch_to)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j)
          for (int64_t line = 0; line < span; line += 64 / sizeof(B))
            prefetch_l2(w + (C + j) * p.b.col_stride + k + line);
      V xv[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) xv[i] = E::load_cells(x + i * p.a.row_stride + k, span);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        const V wv = E::load_cells(w + j * p.b.col_stride + k, span);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) acc[i * C + j] = E::multiply_add(acc[i * C + j], xv[i], wv);
      }
    }
    if (k < k1) {
      V xv[R];
      for (int i = 0; i < R; ++i) xv[i] = E::load_cells(x + i * p.a.row_stride + k, p.k - k);
      for (int j = 0; j < C; ++j) {
        const V wv = E::load_cells(w + j * p.b.col_stride + k, p.k - k);
        for (int i = 0; i < R; ++i) acc[i * C + j] = E::multiply_add(acc[i * C + j], xv[i], wv);
      }
    }
    reduce_dots<E, kCount>(acc, sums, total, p.k > kDotSums * span, k0 == 0, k1 == p.k);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) out[i * ld + j] = sums[i * C + j];
}

template <class E>
using DotBlock = void (*)(const Gemm&, int64_t, int64_t, typename E::Acc*, int64_t);

// Return the dot_block for this many rows of x, so that w is read once for all of them.
template <class E, int R = DLK_DOT_M>
DotBlock<E> dot_block_for(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return dot_block_for<E, R - 1>(rows);
  }
  return &dot_block<E, R, DLK_DOT_N>;
}

// The dot products of a block of rows of x and n rows of w.
template <class E>
DLK_INLINE void dot_rows(const Gemm& p, int64_t i0, int64_t rows, int64_t j0, int64_t n, typename E::Acc* out,
                         int64_t ld) {
  if (n == DLK_DOT_N) return dot_block_for<E>(rows)(p, i0, j0, out, ld);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < n; ++c) dot_block<E, 1, 1>(p, i0 + r, j0 + c, out + r * ld + c, ld);
}

template <class E>
struct FewForwardCall {
  // Columns per task: enough to fill the registers of the epilogue, few enough to spread the tasks over threads.
  static constexpr int64_t kCols = 8 * DLK_DOT_N;
  static constexpr int64_t ld = kCols + 64;
  const Gemm* p;
  EpilogueFn<typename E::ElemC> epilogue;
};

// The forward where x or w has to be rounded and w would be rounded again for every block of rows of x. Both are
// rounded into scratch first: all of x, and w DLK_DOT_N rows at a time.
template <class E>
void few_forward_rounded(const FewForwardCall<E>& call, const Parallel& parallel) {
  parallel.run(ceil_div(call.p->n, call.kCols), &call, [](const void* context, int64_t begin, int64_t end) {
    using Packed = typename E::Packed;
    const auto& call = *(const FewForwardCall<E>*)context;
    const Gemm& p = *call.p;
    const int64_t pitch = round_up(p.k, 64 / sizeof(Packed));
    auto* x = (Packed*)scratch(sizeof(Packed) * (p.m + DLK_DOT_N) * pitch);
    auto* w = x + p.m * pitch;
    for (int64_t i = 0; i < p.m; ++i)
      copy_row<E>(x + i * pitch, (const typename E::Elem*)p.a.data + i * p.a.row_stride, 1, p.k);
    Gemm low = p;
    low.a = {x, pitch, 1};
    low.b = {w, 1, pitch};
    typename E::Acc acc[kFewRowsForward * call.ld];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j0 = task * call.kCols, cols = min(call.kCols, p.n - j0);
      for (int64_t j = 0; j < cols; j += DLK_DOT_N) {
        const int64_t n = min(DLK_DOT_N, cols - j);
        for (int64_t c = 0; c < n; ++c) {
          const auto* row = (const typename E::ElemB*)p.b.data + (j0 + j + c) * p.b.col_stride;
          for (int64_t k = 0; k < p.k; k += 64 / sizeof(*row)) prefetch_l2(row + DLK_DOT_N * p.b.col_stride + k);
          copy_row<E>(w + c * pitch, row, 1, p.k);
        }
        for (int64_t i = 0; i < p.m; i += DLK_DOT_M)
          dot_rows<typename E::Multiply>(low, i, min(DLK_DOT_M, p.m - i), 0, n, acc + i * call.ld + j, call.ld);
      }
      call.epilogue(p, acc, call.ld, 0, j0, p.m, cols);
    }
  });
}

template <class E>
void few_forward_with(const Gemm& p, const Parallel& parallel) {
  const FewForwardCall<E> call = {&p, epilogue_of<typename E::ElemC, typename E::ElemB>(p)};
  if constexpr (!kIsSame<E, typename E::Multiply>) {
    if (p.m > DLK_DOT_M) return few_forward_rounded<E>(call, parallel);
  }
  parallel.run(ceil_div(p.n, call.kCols), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const FewForwardCall<E>*)context;
    const Gemm& p = *call.p;
    typename E::Acc acc[DLK_DOT_M * call.ld];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j0 = task * call.kCols, cols = min(call.kCols, p.n - j0);
      for (int64_t i = 0; i < p.m; i += DLK_DOT_M) {
        const int64_t rows = min(DLK_DOT_M, p.m - i);
        for (int64_t j = 0; j < cols; j += DLK_DOT_N)
          dot_rows<E>(p, i, rows, j0 + j, min(DLK_DOT_N, cols - j), acc + j, call.ld);
        call.epilogue(p, acc, call.ld, i, j0, rows, cols);
      }
    }
  });
}

// Make dz [M, N] of few rows in scratch; every thread makes its own.
template <class E>
const typename E::Packed* few_dz(const Gemm& p, int64_t m, int64_t n, const View& g, const View& saved) {
  const auto source = RowSource<E>::of(g, saved, p.act);
  auto* dz = (typename E::Packed*)scratch(sizeof(typename E::Packed) * (m * n + 64));
  for (int64_t i = 0; i < m; ++i) RowSource<E>::along_row(source, dz + i * n, i, 0, n);
  return dz;
}

// dx[R, cols] += dz[R, U] · w[U, cols]: U rows of weight are in registers while they serve R rows of dx.
template <class T, int R, int U>
DLK_INLINE void add_rows(const Acc<T>* dz, int64_t dz_stride, const T* w, int64_t w_stride, Acc<T>* dx,
                         int64_t dx_stride, int64_t cols) {
  each_register<T>(cols, [&](int64_t j, int64_t valid) DLK_INLINED {
    Vec<Acc<T>> rows[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) rows[u] = load_partial(w + u * w_stride + j, 1, valid);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      auto sum = rows[0] * broadcast(dz[r * dz_stride]);
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum = fma(rows[u], broadcast(dz[r * dz_stride + u]), sum);
      store(dx + r * dx_stride + j, load(dx + r * dx_stride + j) + sum);
    }
  });
}

// A, B, C are the element types of the operands and of the result, as in gemm_traits.h. f32 weights are multiplied
// without rounding.
template <class A, class B, class C>
void few_dgrad_with(const Gemm& p, const Parallel& parallel) {  // p.m = M, p.n = K, p.k = N
  static constexpr int64_t kCols = 512;
  struct Call {
    const Gemm& p;
    int64_t cols;  // of a task: each thread has one at least
  };
  const int64_t share = round_up(ceil_div(p.n, int64_t{parallel.threads}), 4 * kLanes<C>);
  const Call call{p, min(kCols, share)};
  parallel.run(ceil_div(p.n, call.cols), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& [p, most] = *(const Call*)context;
    const auto* dz = few_dz<Convert<A>>(p, p.m, p.k, p.a, p.saved);
    const B* w = (const B*)p.b.data;
    const int64_t ws = p.b.row_stride;
    constexpr int64_t ld = kCols;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j0 = task * most, cols = min(most, p.n - j0);
      Acc<C> dx[kFewRowsDgrad * ld];
      double total[kFewRowsDgrad * ld];
      for (int64_t n0 = 0; n0 < p.k; n0 += kRowSums) {
        const int64_t n1 = min(n0 + kRowSums, p.k);
        for (int64_t i = 0; i < p.m * ld; ++i) dx[i] = 0;
        int64_t n = n0;
        for (; n + 8 <= n1; n += 8) {
          int64_t i = 0;
          for (; i + 4 <= p.m; i += 4)
            add_rows<B, 4, 8>(dz + i * p.k + n, p.k, w + n * ws + j0, ws, dx + i * ld, ld, cols);
          for (; i + 2 <= p.m; i += 2)
            add_rows<B, 2, 8>(dz + i * p.k + n, p.k, w + n * ws + j0, ws, dx + i * ld, ld, cols);
          if (i < p.m) add_rows<B, 1, 8>(dz + i * p.k + n, p.k, w + n * ws + j0, ws, dx + i * ld, ld, cols);
        }
        for (; n < n1; ++n)
          for (int64_t i = 0; i < p.m; ++i)
            add_rows<B, 1, 1>(dz + i * p.k + n, p.k, w + n * ws + j0, ws, dx + i * ld, ld, cols);
        if (p.k > kRowSums) add_to_total(dx, ld, total, ld, p.m, cols, n0 == 0, n1 == p.k);
      }
      // With store_row GCC 12 spills registers of add_rows: 4, 512→512 takes 45 µs in place of 30.
      for (int64_t i = 0; i < p.m; ++i)
        for (int64_t j = 0; j < cols; j += kLanes<C>)
          store_partial((C*)p.c + i * p.n + j0 + j, load(dx + i * ld + j), cols - j);
    }
  });
}

// R rows of dweight, W registers of each, whose sums stay in registers: a loaded register of x serves R rows.
template <int R, int W, class B, class C>
DLK_INLINE void outer_products(const Gemm& p, const B* x, int64_t x_stride, const Acc<C>* dz, C* out, int64_t valid) {
  constexpr int64_t lanes = kLanes<C>;
  Vec<Acc<C>> sums[R][W] = {};
  for (int64_t i = 0; i < p.k; ++i) {
    const B* row = x + i * p.b.row_stride;
    Vec<Acc<C>> values[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) values[w] = load_partial(row + w * lanes * x_stride, x_stride, valid - w * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sums[r][w] = fma(values[w], broadcast(dz[i * p.m + r]), sums[r][w]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) store_partial(out + r * p.n + w * lanes, sums[r][w], valid - w * lanes);
}

// R whole rows of dweight.
template <int R, class B, class C>
DLK_INLINE void outer_rows(const Gemm& p, int64_t x_stride, const Acc<C>* dz, C* out) {
  constexpr int64_t lanes = kLanes<C>;
  const B* x = (const B*)p.b.data;
  int64_t j = 0;
  for (; j + 2 * lanes <= p.n; j += 2 * lanes)
    outer_products<R, 2, B, C>(p, x + j * x_stride, x_stride, dz, out + j, 2 * lanes);
  for (; j < p.n; j += lanes) outer_products<R, 1, B, C>(p, x + j * x_stride, x_stride, dz, out + j, p.n - j);
}

// f32 x is multiplied without rounding.
template <class A, class B, class C>
void few_wgrad_with(const Gemm& p, const Parallel& parallel) {  // p.m = N, p.n = K, p.k = M
  static constexpr int64_t kRows = 32;
  parallel.run(ceil_div(p.m, kRows), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const Gemm*)context;
    const auto* dz = few_dz<Convert<A>>(p, p.k, p.m, p.a.transposed(), p.saved.transposed());
    const int64_t last = min(end * kRows, p.m);
    int64_t n = begin * kRows;
    if (p.b.col_stride == 1)
      for (; n + 4 <= last; n += 4) outer_rows<4, B, C>(p, 1, dz + n, (C*)p.c + n * p.n);
    for (; n < last; ++n) outer_rows<1, B, C>(p, p.b.col_stride, dz + n, (C*)p.c + n * p.n);
    if (!p.row_sum) return;
    for (n = begin * kRows; n < last; ++n) {
      Acc<C> lanes[kLanes<C>] = {};
      for (int64_t i = 0; i < p.k; ++i) lanes[0] += dz[i * p.m + n];
      store_partial((C*)p.row_sum + n, load(lanes), 1);
    }
  });
}

}  // namespace dlk::cpu::DLK_ISA
