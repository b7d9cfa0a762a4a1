// Few rows: the three products straight from memory, nothing packed. weight is read once, in the order it lies there.
//
//   forward  (M <= 32)  dot products along k
//   dgrad    (M <= 8)   rows of weight scaled and added up
//   wgrad    (M <= 8)   outer products, written once
//
// forward: a block of DLK_DOT_M rows of x meets DLK_DOT_N rows of w; each pair has its own accumulator register, so a loaded
// register of w serves every row of x. The lanes are added at the end by row_sums.
namespace dlk::cpu::DLK_ISA {

template <class E, int R, int C>
void dot_block(const Gemm& p, int64_t i0, int64_t j0, typename E::Acc* out, int64_t ld) {
  using V = typename E::V;
  using Elem = typename E::Elem;
  constexpr int kCount = R * C;
  constexpr int kGroups = (kCount + E::kVL - 1) / E::kVL;
  constexpr int64_t span = E::kVL * E::kStep;
  const Elem* x = (const Elem*)p.a.data + i0 * p.a.row_stride;
  const Elem* w = (const Elem*)p.b.data + j0 * p.b.col_stride;
  V acc[kGroups * E::kVL] = {};
  // The first block of rows of x asks for the rows of w that come next. No hardware prefetcher follows from one short row to
  // another; in float32 one that has been started keeps up with the products, in bf16 these are twice as fast.
  const int64_t ask_to = i0 > 0 ? 0 : E::kStep > 1 ? p.k : 128;
  int64_t k = 0;
  for (; k + span <= p.k; k += span) {
    if (k < ask_to)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) prefetch_l2(w + (C + j) * p.b.col_stride + k);
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
  if (k < p.k) {
    V xv[R];
    for (int i = 0; i < R; ++i) xv[i] = E::load_cells(x + i * p.a.row_stride + k, p.k - k);
    for (int j = 0; j < C; ++j) {
      const V wv = E::load_cells(w + j * p.b.col_stride + k, p.k - k);
      for (int i = 0; i < R; ++i) acc[i * C + j] = E::multiply_add(acc[i * C + j], xv[i], wv);
    }
  }
  typename E::Acc sums[kGroups * E::kVL];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) store_bits(sums + g * E::kVL, row_sums(acc + g * E::kVL));
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) out[i * ld + j] = sums[i * C + j];
}

template <class E, int R, int C>
using DotBlock = void (*)(const Gemm&, int64_t, int64_t, typename E::Acc*, int64_t);

template <class E>
void few_forward_with(const Gemm& p, const Parallel& parallel) {
  // Columns per task: enough to fill the epilogue's registers, few enough to spread over threads.
  static constexpr int64_t kCols = 8 * DLK_DOT_N;
  struct Call {
    const Gemm* p;
    EpilogueFn<typename E::Elem> epilogue;
  };
  const Call call = {&p, epilogue_of<typename E::Elem>(p)};
  parallel.run(ceil_div(p.n, kCols), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const Call*)context;
    const Gemm& p = *call.p;
    constexpr int64_t ld = kCols + 64;
    typename E::Acc acc[DLK_DOT_M * ld];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j0 = task * kCols, cols = min(kCols, p.n - j0);
      for (int64_t i = 0; i < p.m; i += DLK_DOT_M) {
        const int64_t rows = min(DLK_DOT_M, p.m - i);
        for (int64_t j = 0; j < cols; j += DLK_DOT_N) {
          if (rows == DLK_DOT_M && cols - j >= DLK_DOT_N) {
            dot_block<E, DLK_DOT_M, DLK_DOT_N>(p, i, j0 + j, acc + j, ld);
          } else {
            const int64_t n = min(DLK_DOT_N, cols - j);
            for (int64_t r = 0; r < rows; ++r) {
              if (n == DLK_DOT_N) {
                dot_block<E, 1, DLK_DOT_N>(p, i + r, j0 + j, acc + r * ld + j, ld);
              } else {
                for (int64_t c = 0; c < n; ++c) dot_block<E, 1, 1>(p, i + r, j0 + j + c, acc + r * ld + j + c, ld);
              }
            }
          }
        }
        call.epilogue(p, acc, ld, i, j0, rows, cols);
      }
    }
  });
}

// dz [M, N] for few rows, made once per thread.
template <class E>
const typename E::Packed* few_dz(const Gemm& p, int64_t m, int64_t n, const View& g, const View& saved) {
  const auto source = Source<E>::of(g, saved, p.act);
  auto* dz = (typename E::Packed*)scratch(sizeof(typename E::Packed) * (m * n + 64));
  for (int64_t i = 0; i < m; ++i) Source<E>::along_row(source, dz + i * n, i, 0, n);
  return dz;
}

// dx[M, K] += dz[M, n..n+U) · weight[n..n+U, K), U rows of weight in registers for R rows of dx.
template <class T, int R, int U>
DLK_INLINE void add_rows(const Acc<T>* dz, int64_t dz_stride, const T* w, int64_t w_stride, Acc<T>* dx,
                         int64_t dx_stride, int64_t cols) {
  for (int64_t j = 0; j < cols; j += kLanes<T>) {
    const int64_t left = min(kLanes<T>, cols - j);
    Vec<Acc<T>> rows[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) rows[u] = load_some(w + u * w_stride + j, 1, left);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      auto sum = rows[0] * broadcast(dz[r * dz_stride]);
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum += rows[u] * dz[r * dz_stride + u];
      store(dx + r * dx_stride + j, load(dx + r * dx_stride + j) + sum);
    }
  }
}

template <class T>
void few_dgrad_with(const Gemm& p, const Parallel& parallel) {  // p.m = M, p.n = K, p.k = N
  static constexpr int64_t kCols = 512;
  parallel.run(ceil_div(p.n, kCols), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const Gemm*)context;
    const auto* dz = few_dz<Convert<T>>(p, p.m, p.k, p.a, p.saved);
    const T* w = (const T*)p.b.data;
    const int64_t ws = p.b.row_stride;
    constexpr int64_t ld = kCols;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j0 = task * kCols, cols = min(kCols, p.n - j0);
      Acc<T> dx[kFewRows * ld];
      for (int64_t i = 0; i < p.m * ld; ++i) dx[i] = 0;
      int64_t n = 0;
      for (; n + 8 <= p.k; n += 8) {
        int64_t i = 0;
        for (; i + 4 <= p.m; i += 4)
          add_rows<T, 4, 8>(dz + i * p.k + n, p.k, w + n * ws + j0, ws, dx + i * ld, ld, cols);
        for (; i < p.m; ++i) add_rows<T, 1, 8>(dz + i * p.k + n, p.k, w + n * ws + j0, ws, dx + i * ld, ld, cols);
      }
      for (; n < p.k; ++n)
        for (int64_t i = 0; i < p.m; ++i)
          add_rows<T, 1, 1>(dz + i * p.k + n, p.k, w + n * ws + j0, ws, dx + i * ld, ld, cols);
      for (int64_t i = 0; i < p.m; ++i)
        for (int64_t j = 0; j < cols; j += kLanes<T>)
          store_some((T*)p.c + i * p.n + j0 + j, load(dx + i * ld + j), cols - j);
    }
  });
}

template <class T>
void few_wgrad_with(const Gemm& p, const Parallel& parallel) {  // p.m = N, p.n = K, p.k = M
  static constexpr int64_t kRows = 32;
  parallel.run(ceil_div(p.m, kRows), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const Gemm*)context;
    const auto* dz = few_dz<Convert<T>>(p, p.k, p.m, p.a.transposed(), p.saved.transposed());
    const int64_t last = min(end * kRows, p.m);
    for (int64_t n = begin * kRows; n < last; ++n) {
      T* out = (T*)p.c + n * p.n;
      for (int64_t j = 0; j < p.n; j += kLanes<T>) {
        const int64_t left = min(kLanes<T>, p.n - j);
        auto sum = Vec<Acc<T>>{};
        for (int64_t i = 0; i < p.k; ++i)
          sum = fma(load_some((const T*)p.b.data + i * p.b.row_stride + j * p.b.col_stride, p.b.col_stride, left),
                    broadcast(dz[i * p.m + n]), sum);
        store_some(out + j, sum, left);
      }
      if (!p.row_sum) continue;
      Acc<T> some[kLanes<T>] = {};
      for (int64_t i = 0; i < p.k; ++i) some[0] += dz[i * p.m + n];
      store_some((T*)p.row_sum + n, load(some), 1);
    }
  });
}

}  // namespace dlk::cpu::DLK_ISA
