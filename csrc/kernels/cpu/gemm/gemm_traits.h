// GEMM traits: how tensors are packed and multiplied. Kernels take them as the template parameter E. A `Cell` is the
// unit of a panel, and what one lane of an FMA reads.
//
//   Convert<T>         a cell is one f32 (f64 for T = double); 16-bit inputs are widened while they are packed
//   Bf16Pairs<A, B, C> a cell is two neighbours along k in bf16, multiplied by vdpbf16ps (only where the ISA has it)
//   AmxPairs<A, B, C>  the same cells, multiplied 16 × 16 × 16 at a time (amx.h)
//
// Elem is the type of A, ElemB the type of B and of the bias, ElemC the type of C, of its preactivation and of its row
// sums. They are one type, except under autocast (autocast.h). Traits that differ only in these types share the
// micro-kernels of `Multiply`. `Panels` are the traits whose micro-kernels it calls: panels of one Cell are alike, whatever
// they were packed from.
namespace dlk::cpu::DLK_ISA {

template <class T>
struct Convert {
  using Elem = T;
  using ElemB = T;
  using ElemC = T;
  using Multiply = Convert;
  using Panels = Convert<DLK_ISA::Acc<T>>;
  using Acc = DLK_ISA::Acc<T>;
  using Packed = Acc;  // one k step in a panel
  using Cell = Packed;
  using V = Vec<Acc>;
  static constexpr int kStep = 1;   // k steps per cell
  static constexpr int kDepth = 1;  // cells along k that a micro-kernel reads at once; panels are padded to a multiple
  static constexpr int kVL = DLK_VBYTES / sizeof(Acc);
  struct Scope {};  // an object of it exists while a thread multiplies

  DLK_INLINE void pack_store(Packed* p, V v) { store(p, v); }
  DLK_INLINE void pack_store_partial(Packed* p, V v, int64_t n) { store_partial(p, v, n); }
  // Load kVL cells that are contiguous along k, of which n elements are valid.
  DLK_INLINE V load_cells(const Elem* p, int64_t n) { return load_partial(p, 1, n); }
  // Make n cells from one row of a k step. Reads and writes whole registers.
  DLK_INLINE void make_cells(Cell* out, const Packed* row, const Packed*, int64_t n) {
    for (int64_t i = 0; i < n; i += kVL) store(out + i, load(row + i));
  }
  DLK_INLINE V multiply_add(V acc, Cell a, V b) { return fma_in_place(broadcast(a), b, acc); }
  DLK_INLINE V multiply_add(V acc, V a, V b) { return fma(a, b, acc); }
};

#ifdef DLK_BF16_PAIRS
// The tensors hold bf16, or f32 that is rounded to bf16 while it is packed.
template <class A, class B = A, class C = A>
struct Bf16Pairs {
  using Elem = A;
  using ElemB = B;
  using ElemC = C;
  using Multiply = Bf16Pairs<Bf16>;
  using Panels = Multiply;
  using Acc = float;
  using Packed = Bf16;
  using Cell = uint32_t;
  using V = VF32;
  static constexpr int kStep = 2;
  static constexpr int kDepth = 1;
  static constexpr int kVL = kF32Lanes;
  typedef uint16_t VU16x2 __attribute__((vector_size(2 * sizeof(VU16))));
  struct Scope {};

  DLK_INLINE void pack_store(Packed* p, VF32 v) { store(p, v); }
  DLK_INLINE void pack_store_partial(Packed* p, VF32 v, int64_t n) { store_partial(p, v, n); }
  DLK_INLINE V load_cells(const Bf16* p, int64_t n) {
    if (n >= 2 * kVL) return load_bits<V>(p);
    return n > 0 ? (V)_mm512_maskz_loadu_epi16((1u << n) - 1, p) : V{};
  }
  DLK_INLINE V load_cells(const float* p, int64_t n) {  // subnormals become 0, as the product reads them
    const VF32 low = load_partial(p, 1, n), high = load_partial(p + kVL, 1, n - kVL);
    return (V)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  // Make n cells from the rows of an even and an odd k step. Reads and writes whole registers.
  DLK_INLINE void make_cells(Cell* out, const Packed* even, const Packed* odd, int64_t n) {
    int64_t i = 0;
    for (; i + 2 * kVL <= n; i += 2 * kVL) {
      const auto lo = load_bits<VU16x2>(even + i), hi = load_bits<VU16x2>(odd + i);
      store_bits(out + i, interleave<0>(lo, hi));
      store_bits(out + i + kVL, interleave<1>(lo, hi));
    }
    for (; i < n; i += kVL) {
      const VU32 lo = widened(load_bits<VU16>(even + i));
      const VU32 hi = widened(load_bits<VU16>(odd + i));
      store_bits(out + i, lo | (hi << 16));
    }
  }
  // The same from f32 rows of n elements, with zeros from n to padded. The odd row may be missing (nullptr).
  DLK_INLINE void round_cells(Cell* out, const float* even, const float* odd, int64_t n, int64_t padded) {
    for (int64_t i = 0; i < padded; i += kVL) {
      const VF32 low = load_partial(even + i, 1, n - i), high = odd ? load_partial(odd + i, 1, n - i) : VF32{};
      const auto pair = (VU16x2)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      store_bits(out + i, halves_interleaved(pair));
    }
  }
  DLK_INLINE V multiply_add(V acc, Cell a, V b) { return multiply_add(acc, (V)(VU32{} + a), b); }
  DLK_INLINE V multiply_add(V acc, V a, V b) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

}  // namespace dlk::cpu::DLK_ISA
