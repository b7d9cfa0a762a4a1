// exp, log, tanh and the normal distribution function on a vector register. Ops is the `O` of activation.h.
//
// f32: polynomials without branches. The coefficients are from a minimax fit (Lawson iteration), and the error of each
// fit is given beside it. With rounding every function stays within 2 ulp (tests/ops/test_accuracy.py measures it).
// f64: libm, lane by lane. Double precision is there for accuracy, not for speed.
#include <math.h>

namespace dlk::cpu::DLK_ISA {

template <class S>
struct Ops;

template <>
struct Ops<double> {
  using T = VF64;
  DLK_INLINE T lit(double v) { return T{} + v; }
  DLK_INLINE T exp(T x) { return lanes(x, ::exp); }
  DLK_INLINE T normal_exp(T x) { return exp(x); }
  DLK_INLINE T log(T x) { return lanes(x, ::log); }
  DLK_INLINE T tanh(T x) { return lanes(x, ::tanh); }
  DLK_INLINE T normal_cdf(T x) {
    return lanes(x, [](double z) { return 0.5 * ::erfc(z * -0.70710678118654752440); });  // 1/sqrt(2)
  }
  __attribute__((noinline)) static T lanes(T x, double (*f)(double)) {
    for (int i = 0; i < kF64Lanes; ++i) x[i] = f(x[i]);
    return x;
  }
};

template <>
struct Ops<float> {
  using T = VF32;
  DLK_INLINE T lit(double v) { return T{} + (float)v; }

  // e^x = 2^n · e^r, n = round(x / ln 2), |r| <= ln(2)/2; e^r = 1 + r + r²·P(r), relative error 3.1e-9. Sets n and returns e^r.
  DLK_INLINE T exp_of_rest(T x, VI32& n) {
    const float magic = 12582912.0f;  // 1.5·2^23: adding it leaves round(·) in the low mantissa bits
    T shifted = fma(x, lit(1.44269504), lit(magic));
    n = (VI32)shifted - 0x4b400000;
    T whole = shifted - magic;
    T r = fma(whole, lit(-0.693359375), x);  // ln 2 in two parts; the first has 9 bits, so that its products are exact
    r = fma(whole, lit(2.12194440e-4), r);
    T p = lit(1.3814559e-3);
    p = fma(p, r, lit(8.368735e-3));
    p = fma(p, r, lit(4.166839e-2));
    p = fma(p, r, lit(1.6666521e-1));
    p = fma(p, r, lit(4.9999994e-1));
    return fma(p * r, r, r) + 1.0f;
  }
  DLK_INLINE T exp(T x) {
    x = x > 89.0f ? lit(89.0) : x;  // e^89 > FLT_MAX; e^-104 < half the smallest subnormal
    x = x < -104.0f ? lit(-104.0) : x;
    VI32 n;
    T e = exp_of_rest(x, n);
    VI32 half = n >> 1;  // 2^n in two factors, because n reaches -150 and 128, which one exponent field cannot hold
    return e * (T)((half + 127) << 23) * (T)((n - half + 127) << 23);
  }
  // The bits of exp for x from -87.3365 to 88, where e^x is a normal number and 2^n is one factor.
  DLK_INLINE T exp_in_range(T x) {
    VI32 n;
    T e = exp_of_rest(x, n);
    return e * (T)((n + 127) << 23);
  }

  // e^x for x <= 0, and 0 where e^x is subnormal: products that read subnormal numbers are many times slower.
  DLK_INLINE T normal_exp(T x) {
    const T least = lit(-87.3365);
    return x < least ? lit(0) : exp_in_range(x < least ? least : x);
  }

  // ln x = n·ln 2 + ln(1 + f), 1 + f in [sqrt(1/2), sqrt(2)); ln(1 + f) = f - f²/2 + f³·P(f), relative error 6.5e-9.
  DLK_INLINE T log(T x) {
    const VI32 subnormal = x < 1.17549435e-38f;
    const T normal = subnormal ? x * 8388608.0f : x;
    const VI32 bits = (VI32)normal - 0x3f3504f3;  // sqrt(1/2): a mantissa below it borrows from the exponent
    const T n = __builtin_convertvector((bits >> 23) - (subnormal ? VI32{} + 23 : VI32{}), T);
    const T f = (T)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    T p = lit(-7.634497e-2);
    p = p * f + 1.2761576e-1f;
    p = p * f + -1.3160183e-1f;
    p = p * f + 1.4201757e-1f;
    p = p * f + -1.6623357e-1f;
    p = p * f + 2.0001227e-1f;
    p = p * f + -2.500082e-1f;
    p = p * f + 3.333333e-1f;
    T y = f * f * (p * f - 0.5f) + n * -2.12194440e-4f;  // ln 2 in the same two parts as in exp
    y = n * 0.693359375f + (f + y);
    y = x < lit(__builtin_inf()) ? y : x;  // Inf and NaN stay
    y = x < 0.0f ? lit(__builtin_nan("")) : y;
    return x == 0.0f ? lit(-__builtin_inf()) : y;
  }

  // |x| < 0.63: x + x³·P(x²), relative error 4.8e-9; else 1 - 2/(e^2|x| + 1), with the sign of x.
  DLK_INLINE T tanh(T x) {
    T s = x * x;
    T p = lit(-5.6669773e-3);
    p = fma(p, s, lit(2.0606177e-2));
    p = fma(p, s, lit(-5.3730007e-2));
    p = fma(p, s, lit(1.3331331e-1));
    p = fma(p, s, lit(-3.3333278e-1));
    T a = abs(x);
    T small = fma(p * s, a, a);
    T large = 1.0f - 2.0f / (exp_in_range(a > 20.0f ? lit(40.0) : a + a) + 1.0f);
    return with_sign(a < 0.63f ? small : large, x);  // the sign comes last, so that tanh(-0) = -0
  }

  // Φ(z), the normal distribution function, from its left tail Φ(-a) = e^(-a²/2)·(1/2 + a·N(a)/D(a)), a = |z|. The bracket has a
  // relative error of 1.7e-9. Near 0 the rounding of N/D is scaled by a, so that Φ there is as exact as one rounding, and the
  // tail is no difference from 1, in which everything would cancel. From a = 12.9 on, shortly before the tail becomes
  // subnormal, it is 0.
  DLK_INLINE T normal_cdf(T z) {
    T a = abs(z);
    T c = a > 12.9f ? lit(12.9) : a;
    T n = lit(-4.20594972631e-3);
    n = fma(n, c, lit(-4.08527625293e-2));
    n = fma(n, c, lit(-1.77837566412e-1));
    n = fma(n, c, lit(-3.99545224669e-1));
    n = fma(n, c, lit(-3.98942322083e-1));
    T d = lit(8.41188629631e-3);
    d = fma(d, c, lit(8.84180032674e-2));
    d = fma(d, c, lit(4.26202902481e-1));
    d = fma(d, c, lit(1.13273524942));
    d = fma(d, c, lit(1.62817000664));
    d = fma(d, c, lit(1));
    T e = normal_exp(lit(-0.5) * z * z);  // GELU's gradient has the same term: the compiler computes it once
    T tail = (a > 12.9f ? lit(0) : e) * fma(n / d, c, lit(0.5));
    return z > 0.0f ? 1.0f - tail : tail;
  }

  DLK_INLINE T abs(T x) { return (T)((VU32)x & 0x7fffffffu); }
  DLK_INLINE T with_sign(T magnitude, T sign) { return (T)((VU32)magnitude | ((VU32)sign & 0x80000000u)); }
};

}  // namespace dlk::cpu::DLK_ISA
