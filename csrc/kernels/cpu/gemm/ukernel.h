// The micro-kernel: an R × (C registers) tile of C stays in registers while k runs.
//
// DLK_MR rows and DLK_NV registers fill the register file: AVX-512 14 × 2 accumulators + 2 of B + 1 broadcast = 31
// of 32. Per k step that is R·C FMAs for C loads of B and R broadcasts of A: with 14 × 2, 28 FMAs for 16 loads.
namespace dlk::cpu::DLK_ISA {

constexpr int64_t kMR = DLK_MR;
constexpr int64_t kNV = DLK_NV;
// k cells per block, and per running sum of one. In f32 that is 256, where MKL cuts its sums too. An A micro-panel of kMR × kKC
// cells takes about half of a 32 KiB L1; AMX's rows are more than twice as many, and its panels half as deep.
template <class E>
constexpr int64_t kKC = (E::kDepth > 1 ? 512 : 1024) / sizeof(typename E::Cell);
// k cells per sum of a tile; such sums are added in f64. In f32 one after the other they err like sqrt(k / 64) again: at
// k = 65536 that was 5 times torch's error. A tile instruction adds to one sum all along, so there they are shorter.
template <class E>
constexpr int64_t kTotalCells = (E::kDepth > 1 ? 8 : 16) * kKC<E>;
// The same where C is a vector: there a library adds up lane by lane, and errs less than a chain of that length.
template <class E>
constexpr int64_t kVectorSum = E::kDepth > 1 ? kKC<E> : 16;
// k steps from the cells of B in hand to those asked for. The panel streams from L2, and no hardware prefetcher follows from
// one panel to the next: AVX-512's micro-kernel gained 5 % on a Xeon with 2 MiB of L2.
constexpr int64_t kStepsAhead = 8;
// Row stride of a row-major A panel: one cache line more than the block, so that rows do not share an L1 set.
template <class E>
constexpr int64_t kAStride = kKC<E> + 64 / sizeof(typename E::Cell);

// A panels come in the orientation their source is contiguous in: rows along k (x, dz), or k along rows (dzᵀ). In place, A
// is not packed: it lies in a block of rows of pitch kAStride, and k runs down them (dzᵀ of a chain).
enum AOrder { kRowMajor, kKMajor, kInPlace };

DLK_INLINE void prefetch_lines(const void* p, int64_t bytes) {
#pragma GCC unroll 4
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)p + at);
}

// The sums that a micro-kernel adds to at its end, asked for at its beginning.
template <class E, int R, int C>
DLK_INLINE void prefetch_tile(const typename E::Acc* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) prefetch_lines(c + i * ldc, C * DLK_VBYTES);
}

template <class E, AOrder order, int R, int C>
void ukernel(int64_t cells, const typename E::Cell* a, const typename E::Cell* b, typename E::Acc* c, int64_t ldc,
             bool add) {
  using V = typename E::V;
  constexpr int64_t row = order == kRowMajor ? kAStride<E> : 1;
  constexpr int64_t step = order == kRowMajor ? 1 : order == kKMajor ? kMR : kAStride<E>;
  V acc[R][C];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[i][j] = V{};
  if (add) prefetch_tile<E, R, C>(c, ldc);
#pragma GCC unroll 1
  for (int64_t p = 0; p < cells; ++p, a += step, b += C * E::kVL) {
    prefetch_lines(b + kStepsAhead * C * E::kVL, C * DLK_VBYTES);
    V bv[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) bv[j] = load_bits<V>(b + j * E::kVL);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[i][j] = E::multiply_add(acc[i][j], a[i * row], bv[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      typename E::Acc* at = c + i * ldc + j * E::kVL;
      store_bits(at, add ? load_bits<V>(at) + acc[i][j] : acc[i][j]);
    }
}

template <class E>
using Ukernel = void (*)(int64_t, const typename E::Cell*, const typename E::Cell*, typename E::Acc*, int64_t, bool);

// Every edge tile has its own micro-kernel, so that no row is computed that does not exist.
template <class E, AOrder order, int R = 1>
Ukernel<E> ukernel_for(int64_t rows, int64_t registers) {
  if constexpr (E::kDepth > 1) {
    return E::ukernel_for(rows, registers);
  } else {
    if constexpr (R < kMR) {
      if (rows > R) return ukernel_for<E, order, R + 1>(rows, registers);
    }
    return registers == 1 ? &ukernel<E, order, R, 1> : &ukernel<E, order, R, int(kNV)>;
  }
}

}  // namespace dlk::cpu::DLK_ISA
