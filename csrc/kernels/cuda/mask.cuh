// Activation masks. Forward stores one bit for each element of y, and backward reads the bits in place of y, a
// sixteenth of the bytes. A bit is read as 1 or 0, which gives the functor the same gradient as y itself.
#pragma once

#include <initializer_list>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/primitives.cuh"

namespace dlk::cuda {

// A kernel that handles kWidth elements of T at once can store a mask: one 16-byte access of 16-bit elements is one
// byte of it.
template <class T, int kWidth>
constexpr bool kHasMask = sizeof(T) == 2 && kWidth == kMaskBits;

// Return whether rows of n elements fill whole bytes of a mask, and all of `memory` allows 16-byte accesses.
inline bool fills_mask_bytes(DType dtype, int64_t n, std::initializer_list<const void*> memory) {
  bool fills = is_16_bit(dtype) && n % kMaskBits == 0;
  for (const void* p : memory) fills = fills && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return fills;
}

// Return is_active of y as it is stored: a y that is rounded to 0 is inactive.
template <class Functor, class T>
DLK_DEVICE bool is_active_rounded(Acc<T> y) {
  T rounded;
  narrow(y, &rounded);
  return is_active<Functor, Ops<Acc<T>>>(widen(rounded));
}

// Store the byte of y[at ... at + 8); `at` is a multiple of 8.
template <class Functor, class T, int kWidth>
DLK_DEVICE void store_mask(void* mask, int64_t at, const Acc<T> (&y)[kWidth]) {
  static_assert(kHasMask<T, kWidth>);
  unsigned bits = 0;
#pragma unroll
  for (int e = 0; e < kMaskBits; ++e) bits |= static_cast<unsigned>(is_active_rounded<Functor, T>(y[e])) << e;
  static_cast<uint8_t*>(mask)[at / kMaskBits] = static_cast<uint8_t>(bits);
}

// The same for the activation `kind`, which has masks.
template <class T, int kWidth>
DLK_DEVICE void store_mask_of(Act kind, void* mask, int64_t at, const Acc<T> (&y)[kWidth]) {
  if (kind == Act::relu)
    store_mask<ReLU, T>(mask, at, y);
  else
    store_mask<LeakyReLU, T>(mask, at, y);
}

// Return the byte of y[at ... at + 8).
DLK_DEVICE unsigned mask_byte(const void* mask, int64_t at) {
  return static_cast<const uint8_t*>(mask)[at / kMaskBits];
}
// Its bits as 1 or 0.
template <class T, int kWidth>
DLK_DEVICE void widen_mask(unsigned bits, Acc<T> (&out)[kWidth]) {
  static_assert(kHasMask<T, kWidth>);
#pragma unroll
  for (int e = 0; e < kMaskBits; ++e) out[e] = static_cast<Acc<T>>(bits >> e & 1);
}
// Load them.
template <class T, int kWidth>
DLK_DEVICE void load_mask(const void* mask, int64_t at, Acc<T> (&out)[kWidth]) {
  widen_mask<T>(mask_byte(mask, at), out);
}

// Load saved[at]; if `bits`, `saved` is a mask, whose bit is read as 1 or 0.
template <class T>
DLK_DEVICE Acc<T> saved_at(const void* saved, bool bits, int64_t at) {
  if (bits) return static_cast<Acc<T>>(static_cast<const uint8_t*>(saved)[at / kMaskBits] >> at % kMaskBits & 1);
  return widen(static_cast<const T*>(saved)[at]);
}

}  // namespace dlk::cuda
