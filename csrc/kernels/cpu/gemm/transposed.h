// Forward of few rows, multiplied as its transpose: cᵀ = bᵀ · aᵀ in place of c = a · b, with the same bits.
//
// Both operands lie along k, and A is packed by copying rows, B by transposing squares. Copying is cheaper, so weight, the larger
// one, becomes A. Micro-tiles are transposed on their way to C, which costs little where k is long.
namespace dlk::cpu::DLK_ISA {

// C has kTransposedRows to kTransposedMostRows rows, and k has kTransposedDepth elements or more for each of them. Measured on
// AVX2 alone, forward: 1.18 times as fast at 32x3136x512, 1.08 at 16x256x256 and 24x1024x1024, 1.02 at 64x512x512 and
// 128x1024x1024; 1.0 at 12x512x512, 0.98 at 96x512x512, 0.88 at 48x100x256.
constexpr bool kTransposes = kMR == 6;  // the micro-tiles of AVX2
constexpr int64_t kTransposedRows = 16, kTransposedMostRows = 128, kTransposedDepth = 8;

// Return whether p is multiplied so. Its rows become columns of micro-tiles, of which at most a quarter may be padding.
template <class E>
bool multiplies_transposed(const Gemm& p) {
  if constexpr (!kTransposes) return false;
  const bool along_k = p.a.col_stride == 1 && p.b.row_stride == 1 && p.b.col_stride != 1;
  const bool plain = !p.saved.data && !p.row_sum && !p.gated && !p.below_saved && p.splits == 1 &&
                     p.output_mode == OutputMode::cast && kIsSame<typename E::Elem, typename E::ElemB>;
  const bool pays = kTransposedRows <= p.m && p.m <= kTransposedMostRows && 2 * p.m <= p.n &&
                    kTransposedDepth * p.m <= p.k && 3 * round_up(p.m, E::kVL) <= 4 * p.m;
  return along_k && plain && pays;
}

// Return the product cᵀ = bᵀ · aᵀ.
inline Gemm transposed_product(const Gemm& p) {
  Gemm transposed = p;
  transposed.m = p.n, transposed.n = p.m;
  transposed.a = p.b.transposed(), transposed.b = p.a.transposed();
  return transposed;
}

// out[c, r] = in[r, c] for rows × cols, in squares of registers. Of the last squares all columns are read, and zeros stand for
// the rows that are missing.
template <class E>
DLK_INLINE void transpose_squares(const typename E::Acc* in, int64_t ld_in, int64_t rows, int64_t cols,
                                  typename E::Acc* out, int64_t ld_out) {
  for (int64_t c = 0; c < cols; c += E::kVL)
    for (int64_t r = 0; r < rows; r += E::kVL) {
      typename E::V square[E::kVL];
#pragma GCC unroll 16
      for (int64_t i = 0; i < E::kVL; ++i)
        square[i] = r + i < rows ? load_bits<typename E::V>(in + (r + i) * ld_in + c) : typename E::V{};
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < E::kVL; ++i) store_bits(out + (c + i) * ld_out + r, square[i]);
    }
}

// Run the epilogue of p on a micro-tile of rows × cols of C. At ct it lies transposed: `cols` rows, kNV registers apart.
template <class E>
void transposed_epilogue(const Gemm& p, EpilogueFn<typename E::ElemC> epilogue, const typename E::Acc* ct, int64_t i0,
                         int64_t j0, int64_t rows, int64_t cols) {
  constexpr int64_t nr = kNV * E::kVL, ld = round_up(kMR, E::kVL);
  typename E::Acc c[nr * ld];
  transpose_squares<E>(ct, nr, cols, rows, c, ld);
  epilogue(p, c, ld, i0, j0, rows, cols);
}

}  // namespace dlk::cpu::DLK_ISA
