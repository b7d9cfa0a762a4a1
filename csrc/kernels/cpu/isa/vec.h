// Vector registers of one instruction set, as compiler vectors: loads, stores, conversions, transposition.
//
// Each ukernel_*.cpp includes it once, after it has set DLK_ISA (a namespace) and DLK_VBYTES (register width in bytes)
// and has switched the compiler's target. Every name lives in that namespace, and only freestanding headers are
// included. So the linker cannot merge a function that was compiled for a newer instruction set with one that older
// processors run.
#include "kernels/activation.h"
#include "kernels/cpu/kernels.h"

#if defined(__x86_64__) && DLK_VBYTES >= 32
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DLK_INLINE static inline __attribute__((always_inline))
#define DLK_INLINED __attribute__((always_inline))  // behind the parameters of a lambda

namespace dlk::cpu::DLK_ISA {

// The 16-bit formats in memory. They are distinct types, so that overloads choose the conversion.
enum class Bf16 : uint16_t {};
enum class F16 : uint16_t {};

constexpr int kF32Lanes = DLK_VBYTES / 4;
constexpr int kF64Lanes = DLK_VBYTES / 8;

typedef float VF32 __attribute__((vector_size(DLK_VBYTES)));
typedef double VF64 __attribute__((vector_size(DLK_VBYTES)));
typedef uint32_t VU32 __attribute__((vector_size(DLK_VBYTES)));
typedef int32_t VI32 __attribute__((vector_size(DLK_VBYTES)));
typedef int64_t VI64 __attribute__((vector_size(DLK_VBYTES)));
typedef uint16_t VU16 __attribute__((vector_size(DLK_VBYTES / 2)));  // as many lanes as VF32

template <class S>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VF32;
};
template <>
struct VecOf<double> {
  using type = VF64;
};
template <class S>
using Vec = typename VecOf<S>::type;

template <class V, class T>
DLK_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
DLK_INLINE void store_bits(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// ---- arithmetic whose rounding is stated ---------------------------------------------------------------------------
// The sources are compiled with -ffp-contract=off: a product and a sum are rounded once only where the code says fma.
// If the compiler chose, two copies of one inlined formula could fuse different products, and a value would depend on
// its place in a tile.

#if defined(__x86_64__) && DLK_VBYTES == 64
DLK_INLINE VF32 broadcast(float a) { return (VF32)_mm512_set1_ps(a); }
DLK_INLINE VF64 broadcast(double a) { return (VF64)_mm512_set1_pd(a); }
DLK_INLINE VF32 fma(VF32 a, VF32 b, VF32 c) { return (VF32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
DLK_INLINE VF64 fma(VF64 a, VF64 b, VF64 c) { return (VF64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
DLK_INLINE VF32 square_root(VF32 a) { return (VF32)_mm512_sqrt_ps((__m512)a); }
DLK_INLINE VF64 square_root(VF64 a) { return (VF64)_mm512_sqrt_pd((__m512d)a); }
#elif defined(__x86_64__) && DLK_VBYTES == 32
DLK_INLINE VF32 broadcast(float a) { return (VF32)_mm256_set1_ps(a); }
DLK_INLINE VF64 broadcast(double a) { return (VF64)_mm256_set1_pd(a); }
DLK_INLINE VF32 fma(VF32 a, VF32 b, VF32 c) { return (VF32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
DLK_INLINE VF64 fma(VF64 a, VF64 b, VF64 c) { return (VF64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
DLK_INLINE VF32 square_root(VF32 a) { return (VF32)_mm256_sqrt_ps((__m256)a); }
DLK_INLINE VF64 square_root(VF64 a) { return (VF64)_mm256_sqrt_pd((__m256d)a); }
#else
DLK_INLINE VF32 broadcast(float a) { return VF32{a, a, a, a}; }
DLK_INLINE VF64 broadcast(double a) { return VF64{a, a}; }
DLK_INLINE VF32 square_root(VF32 a) {
  for (int i = 0; i < kF32Lanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
DLK_INLINE VF64 square_root(VF64 a) {
  for (int i = 0; i < kF64Lanes; ++i) a[i] = __builtin_sqrt(a[i]);
  return a;
}
#if defined(__aarch64__)
DLK_INLINE VF32 fma(VF32 a, VF32 b, VF32 c) { return (VF32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
DLK_INLINE VF64 fma(VF64 a, VF64 b, VF64 c) { return (VF64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
DLK_INLINE VF32 fma(VF32 a, VF32 b, VF32 c) { return a * b + c; }
DLK_INLINE VF64 fma(VF64 a, VF64 b, VF64 c) { return a * b + c; }
#endif
#endif

// fma(a, b, acc) for micro-kernels. With the 16 registers of AVX2 the result takes acc's. GCC 12 overwrites a factor in some
// places of an unrolled loop, and then copies and spills accumulators, which cost 6 %.
#if defined(__x86_64__) && DLK_VBYTES == 32
DLK_INLINE VF32 fma_in_place(VF32 a, VF32 b, VF32 acc) {
  asm("vfmadd231ps %1, %2, %0" : "+x"(acc) : "x"(b), "x"(a));
  return acc;
}
DLK_INLINE VF64 fma_in_place(VF64 a, VF64 b, VF64 acc) {
  asm("vfmadd231pd %1, %2, %0" : "+x"(acc) : "x"(b), "x"(a));
  return acc;
}
#else
template <class V>
DLK_INLINE V fma_in_place(V a, V b, V acc) {
  return fma(a, b, acc);
}
#endif

// ---- 16-bit formats ---------------------------------------------------------------------------------------------

// GCC 12 takes four instructions for either of these on AVX2.
#if defined(__x86_64__) && DLK_VBYTES == 32
DLK_INLINE VU32 widened(VU16 h) { return (VU32)_mm256_cvtepu16_epi32((__m128i)h); }
DLK_INLINE VU16 narrowed(VU32 u) {  // lanes below 2¹⁶
  const auto low = _mm256_castsi256_si128((__m256i)u), high = _mm256_extracti128_si256((__m256i)u, 1);
  return (VU16)_mm_packus_epi32(low, high);
}
#else
DLK_INLINE VU32 widened(VU16 h) { return __builtin_convertvector(h, VU32); }
DLK_INLINE VU16 narrowed(VU32 u) { return __builtin_convertvector(u, VU16); }
#endif

DLK_INLINE VF32 from_bits(Bf16, VU16 h) { return (VF32)(widened(h) << 16); }

// Round to nearest, ties to even: add half of the last bit that stays, minus 1 unless that bit is odd. NaN stays NaN.
DLK_INLINE VU16 to_bits(Bf16, VF32 f) {
#ifdef DLK_BF16_PAIRS
  // One instruction does the same, but flushes subnormals to 0. They (class 0x20) are rare enough for a branch.
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)f, 0x20) == 0, 1)) return (VU16)_mm512_cvtneps_pbh((__m512)f);
#endif
  VU32 u = (VU32)f;
  VU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VU32 nan = VU32{} + 0x7fc0u;
  return narrowed(f != f ? nan : rounded);
}

#if defined(__x86_64__) && DLK_VBYTES == 64
// With a mask of all lanes: GCC 12 warns of an uninitialized register inside the forms without one. The code is the same.
DLK_INLINE VF32 from_bits(F16, VU16 h) { return (VF32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
DLK_INLINE VU16 to_bits(F16, VF32 f) {
  return (VU16)_mm512_maskz_cvtps_ph(0xffff, (__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__x86_64__) && DLK_VBYTES == 32
DLK_INLINE VF32 from_bits(F16, VU16 h) { return (VF32)_mm256_cvtph_ps((__m128i)h); }
DLK_INLINE VU16 to_bits(F16, VF32 f) { return (VU16)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT); }
#else
// binary16 has 5 exponent bits (bias 15) and 10 mantissa bits. Placed in a binary32 word, its value is too small by a
// factor of 2^(127-15). One multiplication corrects this for normal and subnormal numbers; Inf and NaN are set
// separately.
DLK_INLINE VF32 from_bits(F16, VU16 h) {
  VU32 u = widened(h);
  VU32 magnitude = (u & 0x7fffu) << 13;
  VF32 scaled = (VF32)magnitude * 0x1p112f;
  VU32 special = magnitude | 0x7f800000u;
  VU32 bits = magnitude >= (0x7c00u << 13) ? special : (VU32)scaled;
  return (VF32)(bits | ((u & 0x8000u) << 16));
}
// Adding 2^(e+13) (at least 2^-1, where subnormals of binary16 end) makes the FPU drop exactly the bits that binary16
// does not have, rounding to nearest even. Subtracting it again leaves the rounded value.
DLK_INLINE VU16 to_bits(F16, VF32 f) {
  VU32 u = (VU32)f;
  VU32 sign = (u & 0x80000000u) >> 16;
  VU32 a = u & 0x7fffffffu;
  VU32 exponent = a & 0x7f800000u;
  VU32 floor = VU32{} + 0x38800000u;  // 2^-14, the smallest normal binary16
  VU32 base = (exponent < floor ? floor : exponent) + (13u << 23);
  VU32 usable = a > 0x477fffffu ? VU32{} : a;  // >= 65536, Inf and NaN are set below
  VF32 rounded = ((VF32)usable + (VF32)base) - (VF32)base;
  VU32 normal = ((VU32)rounded >> 13) - (112u << 10);
  VU32 subnormal = __builtin_convertvector(rounded * 0x1p24f, VU32);
  VU32 r = (VU32)rounded < floor ? subnormal : normal;
  VU32 inf = VU32{} + 0x7c00u, nan = VU32{} + 0x7e00u;
  r = a > 0x477fffffu ? inf : (r > 0x7c00u ? inf : r);
  r = a > 0x7f800000u ? nan : r;
  return narrowed(r | sign);
}
#endif

// ---- one register of values, from any memory format ---------------------------------------------------------

DLK_INLINE VF32 load(const float* p) { return load_bits<VF32>(p); }
DLK_INLINE VF64 load(const double* p) { return load_bits<VF64>(p); }
DLK_INLINE VF32 load(const Bf16* p) { return from_bits(Bf16{}, load_bits<VU16>(p)); }
DLK_INLINE VF32 load(const F16* p) { return from_bits(F16{}, load_bits<VU16>(p)); }

DLK_INLINE void store(float* p, VF32 v) { store_bits(p, v); }
DLK_INLINE void store(double* p, VF64 v) { store_bits(p, v); }
DLK_INLINE void store(Bf16* p, VF32 v) { store_bits(p, to_bits(Bf16{}, v)); }
DLK_INLINE void store(F16* p, VF32 v) { store_bits(p, to_bits(F16{}, v)); }

// The type that a memory type is computed and accumulated in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;
template <class T>
constexpr int kLanes = DLK_VBYTES / sizeof(Acc<T>);

// The first n elements of a register, 0 < n < lanes. Other lanes are zero, or not stored. Where no instruction takes a mask
// these are out of line: inlined, such loops were a quarter of the code of all kernels, and of the time that a compiler takes.
template <class T>
static __attribute__((noinline)) Vec<Acc<T>> load_lanes(const T* p, int64_t stride, int64_t n) {
  T lanes[kLanes<T>] = {};
  if (n >= kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) lanes[i] = p[i * stride];
  } else {
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i * stride];
  }
  return load(lanes);
}
template <class T>
static __attribute__((noinline)) void store_lanes(T* p, Vec<Acc<T>> v, int64_t n) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#if defined(__x86_64__) && DLK_VBYTES == 64
DLK_INLINE VF32 load_first(const float* p, int64_t n) { return (VF32)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
DLK_INLINE VF64 load_first(const double* p, int64_t n) { return (VF64)_mm512_maskz_loadu_pd((1u << n) - 1, p); }
template <class T>
DLK_INLINE VF32 load_first(const T* p, int64_t n) {
  return from_bits(T{}, (VU16)_mm256_maskz_loadu_epi16((1u << n) - 1, p));
}
DLK_INLINE void store_first(float* p, VF32 v, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
DLK_INLINE void store_first(double* p, VF64 v, int64_t n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v); }
template <class T>
DLK_INLINE void store_first(T* p, VF32 v, int64_t n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)to_bits(T{}, v));
}
#else
#if defined(__x86_64__) && DLK_VBYTES == 32
DLK_INLINE __m256i first_of_8(int64_t n) { return (__m256i)(VI32{0, 1, 2, 3, 4, 5, 6, 7} < (int)n); }
DLK_INLINE __m256i first_of_4(int64_t n) { return (__m256i)(VI64{0, 1, 2, 3} < n); }
DLK_INLINE VF32 load_first(const float* p, int64_t n) { return (VF32)_mm256_maskload_ps(p, first_of_8(n)); }
DLK_INLINE VF64 load_first(const double* p, int64_t n) { return (VF64)_mm256_maskload_pd(p, first_of_4(n)); }
DLK_INLINE void store_first(float* p, VF32 v, int64_t n) { _mm256_maskstore_ps(p, first_of_8(n), (__m256)v); }
DLK_INLINE void store_first(double* p, VF64 v, int64_t n) { _mm256_maskstore_pd(p, first_of_4(n), (__m256d)v); }
#endif
template <class T>
DLK_INLINE Vec<Acc<T>> load_first(const T* p, int64_t n) {
  return load_lanes(p, 1, n);
}
template <class T>
DLK_INLINE void store_first(T* p, Vec<Acc<T>> v, int64_t n) {
  store_lanes(p, v, n);
}
#endif

// Load min(n, lanes) elements at a stride; the other lanes are zero.
template <class T>
DLK_INLINE Vec<Acc<T>> load_partial(const T* p, int64_t stride, int64_t n) {
  if (stride != 1) return load_lanes(p, stride, n);
  if (n >= kLanes<T>) return load(p);
  return n > 0 ? load_first(p, n) : Vec<Acc<T>>{};
}
// Store the first min(n, lanes) lanes.
template <class T>
DLK_INLINE void store_partial(T* p, Vec<Acc<T>> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
  if (n > 0) store_first(p, v, n);
}

// Call f(i, valid) for every register of a row of n elements; element i is its first one. On AVX2 whole registers have a loop
// of their own, where `valid` is a constant: the end of a 16-bit row takes a call, and a loop with a call in it keeps nothing
// in registers.
template <class T, class F>
DLK_INLINE void each_register(int64_t n, F&& f) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t i = 0;
  if constexpr (DLK_VBYTES == 32)
    for (; i + lanes <= n; i += lanes) f(i, lanes);
  for (; i < n; i += lanes) f(i, n - i < lanes ? n - i : lanes);
}

// A sum in every lane that keeps what each addition rounds away (Knuth's two-sum). A long sum errs no more than a short
// one.
template <class V>
struct ExactLanes {
  V sum{}, lost{};

  DLK_HD void add(V term) {
    const V next = sum + term, added = next - sum;
    lost += (sum - (next - added)) + (term - added);
    sum = next;
  }
  DLK_HD V value() const {
    return sum - sum == V{} ? sum + lost : sum;  // an infinite sum stays as it is: `lost` is NaN then
  }
};

// ---- permutations -----------------------------------------------------------------------------------------------

// Lane i of the result is lane index[i] of the lanes of a followed by the lanes of b.
template <class V, class I>
DLK_INLINE V shuffled(V a, V b, I index) {
#if defined(__clang__)
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  V r;
  for (int i = 0; i < lanes; ++i) r[i] = index[i] < lanes ? a[index[i]] : b[index[i] - lanes];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// a0 b0 a1 b1 ... from the lower halves (half = 0) or the upper halves (half = 1) of a and b. With `part`, of every part of
// so many lanes.
template <int half, int part = 0, class V>
DLK_INLINE V interleave(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]), of = part ? part : lanes;
  using I = decltype(a < b);
  I index;
  for (int i = 0; i < lanes; ++i) index[i] = i / of * of + half * of / 2 + i % of / 2 + (i % 2) * lanes;
  return shuffled(a, b, index);
}

// The lower halves (half = 0) or the upper halves (half = 1) of a and b, one behind the other.
template <int half, class V>
DLK_INLINE V halves(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  using I = decltype(a < b);
  I index;
  for (int i = 0; i < lanes; ++i) index[i] = half * lanes / 2 + i % (lanes / 2) + (i < lanes / 2 ? 0 : lanes);
  return shuffled(a, b, index);
}

// a0 b0 a1 b1 ... from one register whose lower half is a and whose upper half is b.
template <class V>
DLK_INLINE V halves_interleaved(V ab) {
  constexpr int lanes = sizeof(V) / sizeof(ab[0]);
  using I = decltype(ab < ab);
  I index;
  for (int i = 0; i < lanes; ++i) index[i] = i / 2 + (i % 2) * (lanes / 2);
#if defined(__clang__)
  V r;
  for (int i = 0; i < lanes; ++i) r[i] = ab[index[i]];
  return r;
#else
  return __builtin_shuffle(ab, index);
#endif
}

// Transpose a square of lanes × lanes in registers, by log2(lanes) rounds of perfect shuffles of rows i and i + lanes/2.
// AVX2 shuffles within halves alone in one instruction. So its halves change places first, and then both halves of a
// register are parts of squares of their own: 24 instructions for 8 × 8, where rounds over whole registers take 48.
template <class V>
DLK_INLINE void transpose(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(rows[0][0]), square = sizeof(V) == 32 ? lanes / 2 : lanes;
  if constexpr (square < lanes)
#pragma GCC unroll 8
    for (int i = 0; i < square; ++i) {
      const V a = rows[i], b = rows[i + square];
      rows[i] = halves<0>(a, b);
      rows[i + square] = halves<1>(a, b);
    }
#pragma GCC unroll 2
  for (int first = 0; first < lanes; first += square) {
    V other[square];
    V *from = rows + first, *to = other;
#pragma GCC unroll 8
    for (int round = 1; round < square; round *= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < square / 2; ++i) {
        to[2 * i] = interleave<0, square>(from[i], from[i + square / 2]);
        to[2 * i + 1] = interleave<1, square>(from[i], from[i + square / 2]);
      }
      V* swap = from;
      from = to;
      to = swap;
    }
    if (from != rows + first)
      for (int i = 0; i < square; ++i) rows[first + i] = from[i];
  }
}

// Lane i of the result is from a where i has the bit `bit` clear, from b where it is set. It is lane i of that register
// (swap = 0), or lane i ^ bit (swap = 1).
template <int bit, int swap, class V>
DLK_INLINE V select_by_bit(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  using I = decltype(a < b);
  I index;
  for (int i = 0; i < lanes; ++i) index[i] = (i ^ (swap * bit)) + (i & bit ? lanes : 0);
  return shuffled(a, b, index);
}

// Lane i of the result is the sum of the lanes of rows[i]. It is a tree: 3 operations per sum, one of which crosses
// lanes. Overwrites rows.
template <class V, int half = sizeof(V) / sizeof(V{}[0]) / 2>
DLK_INLINE V row_sums(V* rows) {
  if constexpr (half > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      rows[i] = select_by_bit<half, 0>(rows[i], rows[i + half]) + select_by_bit<half, 1>(rows[i], rows[i + half]);
    return row_sums<V, half / 2>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace dlk::cpu::DLK_ISA
