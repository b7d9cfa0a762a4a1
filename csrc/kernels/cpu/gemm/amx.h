// AmxPairs: pairs of bf16 along k, multiplied by AMX. An AMX tile register is 16 rows of 64 bytes. One instruction adds
// the product of two tiles to a third: 16 × 16 sums of 32 bf16 products each.
//
// The panels are those of Bf16Pairs. A row of a B micro-panel is a row of a B tile (two k steps of each column). A
// panels are row-major along k; a block of A that is contiguous along rows is transposed while it is packed. Panels end
// with zeros up to whole tiles along k, so that one tile configuration serves every product. Rows beyond the last one
// hold old scratch, which reaches only their own sums.
namespace dlk::cpu::DLK_ISA {

// The operand of ldtilecfg. Palette 1 has eight tiles; each gets the full size.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// R × C tiles of C are in tmm0 to tmm3, A in tmm4 and tmm5, B in tmm6 and tmm7. With 2 × 2 a step is four products for
// four loads. Rows of A are a_bytes apart. The operand that comes from memory is prefetched: A with kStreamsA, `ahead`
// steps before its use, otherwise the next step of B.
template <class E, int R, int C, bool kStreamsA>
DLK_INLINE void tile_product(int64_t cells, const typename E::Cell* a, int64_t a_bytes, const typename E::Cell* b,
                             float* c, int64_t ldc, bool add) {
  constexpr int64_t size = 16;  // rows of a tile, and cells of a row
  constexpr int64_t b_bytes = C * size * sizeof(*b), ahead = 4;
  const auto* a_below = (const typename E::Cell*)((const char*)a + size * a_bytes);
  const int64_t c_bytes = ldc * sizeof(*c);
  float* below = c + size * ldc;
  // GCC 12 does not know that a tile load reads memory: the panels must have been stored here.
  __asm__ volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (C > 1) _tile_loadd(1, c + size, c_bytes);
    if constexpr (R > 1) _tile_loadd(2, below, c_bytes);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, below + size, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
#pragma GCC unroll 1
  for (int64_t p = 0; p < cells; p += size, a += size, a_below += size, b += size * C * size) {
    if constexpr (kStreamsA) {
#pragma GCC unroll 32
      for (int64_t i = 0; i < R * size; ++i) __builtin_prefetch((const char*)(a + ahead * size) + i * a_bytes);
    } else {
      prefetch_lines(b + size * C * size, C * size * 64);
    }
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b + size, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a_below, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (C > 1) _tile_stored(1, c + size, c_bytes);
  if constexpr (R > 1) _tile_stored(2, below, c_bytes);
  if constexpr (R > 1 && C > 1) _tile_stored(3, below + size, c_bytes);
}

// The micro-kernel of AMX.
template <class E, int R, int C>
void tile_ukernel(int64_t cells, const typename E::Cell* a, const typename E::Cell* b, int64_t, float* c, int64_t ldc,
                  bool add, const LinesAhead*) {
  tile_product<E, R, C, false>(cells, a, kAStride<E> * sizeof(*a), b, c, ldc, add);
}

template <class A, class B = A, class C = A>
struct AmxPairs : Bf16Pairs<A, B, C> {
  using Base = Bf16Pairs<A, B, C>;
  using Multiply = AmxPairs<Bf16>;
  using Base::kVL;
  using typename Base::Cell;
  using typename Base::V;
  static constexpr int kDepth = 16;
  static_assert(kMR == 2 * kDepth && kNV == 2 && kVL == kDepth, "2 × 2 tiles");

  // The tile registers of a thread. Once they are released, a context switch does not have to save them.
  struct Scope {
    Scope() { _tile_loadconfig(&kTileConfig); }
    ~Scope() { _tile_release(); }
    Scope(const Scope&) = delete;
  };

  // Pack the cells of all rows at one k step (a `line`) into row-major panels. A line is first stored as a row of the
  // square of 16 × 16 cells that it belongs to. The last of 16 lines transposes the square in place.
  static void pack_k_step(Cell* out, const Cell* line, int64_t q, int64_t rows) {
    constexpr int64_t stride = kAStride<AmxPairs>;
    const int64_t step = q % kDepth;
    for (int64_t i = 0; i < rows; i += kVL) {
      Cell* block = out + i * stride + (q - step);
      if (step + 1 < kDepth) {
        store_bits(block + step * stride, load_bits<V>(line + i));
        continue;
      }
      V square[kVL];
#pragma GCC unroll 16
      for (int64_t r = 0; r + 1 < kVL; ++r) square[r] = load_bits<V>(block + r * stride);
      square[kVL - 1] = load_bits<V>(line + i);
      transpose(square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kVL; ++r) store_bits(block + r * stride, square[r]);
    }
  }

  static Ukernel<AmxPairs> ukernel_for(int64_t rows, int64_t registers) {
    if (rows > kDepth) return registers == 1 ? &tile_ukernel<AmxPairs, 2, 1> : &tile_ukernel<AmxPairs, 2, 2>;
    return registers == 1 ? &tile_ukernel<AmxPairs, 1, 1> : &tile_ukernel<AmxPairs, 1, 2>;
  }
};

// The arithmetic peak of a core by tiles, as peak_loop() of the other instruction sets: four sums of 16 × 16, and four
// operands that stay in their registers. They are no zeros, because those draw less power and let the clock rise.
inline int64_t tile_peak_loop(int64_t steps) {
  const typename AmxPairs<Bf16>::Scope scope;
  alignas(64) uint16_t values[4 * 16 * 32];
  uint32_t seed = 1;
  for (uint16_t& value : values) {  // ±[1/4, 1/2)
    seed = seed * 1664525 + 1013904223;
    value = 0x3e80 | (seed >> 16 & 0x807f);
  }
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, values, 64);
  _tile_loadd(5, values + 512, 64);
  _tile_loadd(6, values + 1024, 64);
  _tile_loadd(7, values + 1536, 64);
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return steps * 4 * 16 * 16 * 32 * 2;
}

}  // namespace dlk::cpu::DLK_ISA
