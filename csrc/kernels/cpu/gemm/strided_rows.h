// Strided memory to contiguous rows of values. Packing reads its operands through these functions, and dz is made here.
namespace dlk::cpu::DLK_ISA {

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
constexpr bool kIsSame<A, A> = true;

// Return v rounded to T, as a tensor of T would hold it.
template <class T>
DLK_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (kIsSame<T, Acc<T>>) {
    return v;
  } else {
    return from_bits(T{}, to_bits(T{}, v));
  }
}

// dst[0..n) = src[0..n) at a stride, converted to the packed type.
template <class E, class T>
DLK_INLINE void copy_row(typename E::Packed* dst, const T* src, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1) {
    if constexpr (kIsSame<typename E::Packed, T>) {
      constexpr int64_t line = DLK_VBYTES / sizeof(*src);  // most rows are short: a call would cost more than the copy
      for (; n <= 16 * line && i + line <= n; i += line) store_bits(dst + i, load_bits<VU32>(src + i));
      if (n > i) __builtin_memcpy(dst + i, src + i, (n - i) * sizeof(*src));  // src of an empty tensor is null
      return;
    }
    if constexpr (E::kStep == 2)  // one instruction rounds two registers
      for (; i + 2 * E::kVL <= n; i += 2 * E::kVL) store_bits(dst + i, E::load_cells(src + i, 2 * E::kVL));
    for (; i + E::kVL <= n; i += E::kVL) E::pack_store(dst + i, load(src + i));
  }
  for (; i < n; i += E::kVL) {
    const int64_t valid = n - i < E::kVL ? n - i : E::kVL;
    E::pack_store_partial(dst + i, load_partial(src + i * stride, stride, valid), valid);
  }
}

// out[0..n) = row[0..n), rounded to T.
template <class T>
DLK_INLINE void store_row(T* out, const Acc<T>* row, int64_t n) {
  each_register<T>(
      n, [&](int64_t i, int64_t valid) DLK_INLINED { store_partial(out + i, load_partial(row + i, 1, valid), valid); });
}

#ifdef DLK_BF16_PAIRS
// ReLU's gradient in bf16 is g or 0, and is selected without widening to f32. It is g where the bits of y are above 0
// as a signed integer (y > 0, or a NaN), or above -Inf as an unsigned one (a NaN with the sign bit).
DLK_INLINE void relu_dz_row(Bf16* dst, const Bf16* g, const Bf16* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 valid = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
    const __m512i bits = _mm512_maskz_loadu_epi16(valid, y + i), minus_infinity = _mm512_set1_epi16((short)0xff80);
    const __mmask32 active =
        _mm512_cmpgt_epi16_mask(bits, _mm512_setzero_si512()) | _mm512_cmpgt_epu16_mask(bits, minus_infinity);
    _mm512_mask_storeu_epi16(dst + i, valid, _mm512_maskz_loadu_epi16(active, g + i));
  }
}
#endif

// dst[0..n) = g · act'(saved): one row of dz, the gradient of the preactivation. It is a function of the packed type P and
// of the tensors' type T, which several traits have in common.
template <class P, class T, class Act>
void dz_row(P* dst, const T* g, int64_t g_stride, const T* saved, int64_t saved_stride, int64_t n, double slope) {
  using O = Ops<Acc<T>>;
  constexpr int64_t kVL = kLanes<T>;
  const auto s = O::lit(slope);
#ifdef DLK_BF16_PAIRS
  if constexpr (kIsSame<Act, ReLU> && kIsSame<P, Bf16> && kIsSame<T, Bf16>)
    if (g_stride == 1 && saved_stride == 1) return relu_dz_row(dst, g, saved, n);
#endif
  int64_t i = 0;
  if (g_stride == 1 && saved_stride == 1) {
    for (; i + kVL <= n; i += kVL) store(dst + i, Act::template grad<O>(load(g + i), load(saved + i), s));
  }
  for (; i < n; i += kVL) {
    const int64_t valid = n - i < kVL ? n - i : kVL;
    auto gv = load_partial(g + i * g_stride, g_stride, valid);
    auto sv = load_partial(saved + i * saved_stride, saved_stride, valid);
    store_partial(dst + i, Act::template grad<O>(gv, sv, s), valid);
  }
}

// The sum of many rows, column by column (dbias). Blocks of 16 rows are summed in the accumulator type, and the blocks
// in f64. This errs less than torch's cascade, and costs one addition per element.
template <class E>
struct ColumnSum {
  static constexpr int kBlock = 16;
  double* total;           // [n]
  typename E::Acc* block;  // [n], the sums of the current block
  int in_block = 0;        // rows in it

  void clear(int64_t n) {
    for (int64_t i = 0; i < n; ++i) total[i] = block[i] = 0;
    in_block = 0;
  }
  void add(const typename E::Packed* row, int64_t n) {
    auto* const sums = block;  // a copy, which the stores below cannot change
    each_register<typename E::Elem>(n, [&](int64_t i, int64_t valid) DLK_INLINED {
      store_partial(sums + i, load_partial(sums + i, 1, valid) + load_partial(row + i, 1, valid), valid);
    });
    if (++in_block == kBlock) flush(n);
  }
  // Add `rows` rows that lie `pitch` apart, with the same sums as one after the other.
  void add_rows(const typename E::Packed* first, int64_t pitch, int64_t rows, int64_t n) {
    auto* const sums = block;
    while (rows > 0) {
      const int64_t count = rows < kBlock - in_block ? rows : kBlock - in_block;
      each_register<typename E::Elem>(n, [&](int64_t i, int64_t valid) DLK_INLINED {
        auto sum = load_partial(sums + i, 1, valid);
        for (int64_t r = 0; r < count; ++r) sum += load_partial(first + r * pitch + i, 1, valid);
        store_partial(sums + i, sum, valid);
      });
      first += count * pitch, rows -= count, in_block += count;
      if (in_block == kBlock) flush(n);
    }
  }
  void flush(int64_t n) {
    for (int64_t i = 0; i < n; ++i) total[i] += block[i];
    for (int64_t i = 0; i < n; ++i) block[i] = 0;
    in_block = 0;
  }
  template <class T>
  void store(T* out, int64_t n) const {
    for (int64_t i = 0; i < n; i += E::kVL) {
      typename E::Acc lanes[E::kVL] = {};
      const int64_t valid = n - i < E::kVL ? n - i : E::kVL;
      for (int64_t c = 0; c < valid; ++c) lanes[c] = (typename E::Acc)total[i + c];
      store_partial(out + i, load(lanes), valid);
    }
  }
};

// How many rows before its use a row is prefetched, where rows lie pages apart and no hardware prefetcher follows. The
// prefetch goes to L2, because at power-of-two strides all of these rows fall in one L1 set.
constexpr int64_t kAhead = 16;
DLK_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// The A operand as contiguous rows, read along either direction: plain values, or dz where `saved` is set.
template <class E>
struct RowSource {
  using Elem = typename E::Elem;
  using Packed = typename E::Packed;

  View view, saved;
  double slope;
  void (*grad)(Packed*, const Elem*, int64_t, const Elem*, int64_t, int64_t, double);  // dz_row, or nullptr: plain

  static RowSource of(const View& view, const View& saved, const Activation& act) {
    auto grad = with_activation(act.kind, [](auto functor) { return &dz_row<Packed, Elem, decltype(functor)>; });
    return {view, saved, act.slope, saved.data ? grad : nullptr};
  }

  // dst[0..n) = A[row, col .. col + n)
  DLK_INLINE void along_row(const RowSource& a, Packed* dst, int64_t row, int64_t col, int64_t n) {
    const Elem* p = (const Elem*)a.view.data + row * a.view.row_stride + col * a.view.col_stride;
    if (!a.grad) return copy_row<E>(dst, p, a.view.col_stride, n);
    const Elem* s = (const Elem*)a.saved.data + row * a.saved.row_stride + col * a.saved.col_stride;
    a.grad(dst, p, a.view.col_stride, s, a.saved.col_stride, n, a.slope);
  }
  DLK_INLINE void prefetch_row(const View& v, int64_t row, int64_t col, int64_t n) {
    if (v.col_stride != 1) return;
    const Elem* p = (const Elem*)v.data + col * v.row_stride + row;
    for (int64_t i = 0; i < n; i += 64 / sizeof(Elem)) prefetch_l2(p + i);
  }
  // dst[0..n) = A[row .. row + n, col)
  DLK_INLINE void along_col(const RowSource& a, Packed* dst, int64_t row, int64_t col, int64_t n) {
    const RowSource t = {a.view.transposed(), a.saved.transposed(), a.slope, a.grad};
    prefetch_row(t.view, row, col + kAhead, n);
    if (t.grad) prefetch_row(t.saved, row, col + kAhead, n);
    along_row(t, dst, col, row, n);
  }
};

}  // namespace dlk::cpu::DLK_ISA
