// The parts of CUDA that kernels use: element types and their conversions, the scalar `Ops`, and PTX.
//
// tests/emulation/cuda/ has replacements for the CUDA headers that are included here, and for ptx.cuh. With them g++
// compiles the kernels for the host, and tests run them without a GPU. A kernel that uses something new from CUDA needs
// it there too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "kernels/activation.h"

#define DLK_DEVICE __device__ __forceinline__

namespace dlk::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

DLK_DEVICE float widen(Bf16 v) { return __bfloat162float(v); }
DLK_DEVICE float widen(F16 v) { return __half2float(v); }

// Round to nearest, ties to even.
DLK_DEVICE void narrow(float v, Bf16* out) { *out = __float2bfloat16_rn(v); }
DLK_DEVICE void narrow(float v, F16* out) { *out = __float2half_rn(v); }

DLK_DEVICE double widen(double v) { return v; }
DLK_DEVICE float widen(float v) { return v; }
DLK_DEVICE void narrow(double v, double* out) { *out = v; }
DLK_DEVICE void narrow(float v, float* out) { *out = v; }

// The type that a T is accumulated in.
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

// The `O` of activation.h for one scalar.
template <class A>
struct Ops {
  using T = A;
  DLK_DEVICE static T lit(double v) { return static_cast<T>(v); }
  DLK_DEVICE static T exp(T v) { return std::exp(v); }
  DLK_DEVICE static T normal_exp(T v) { return std::exp(v); }  // a GPU computes with subnormal numbers at full speed
  DLK_DEVICE static T log(T v) { return std::log(v); }
  DLK_DEVICE static T tanh(T v) { return std::tanh(v); }
  DLK_DEVICE static T normal_cdf(T v) {  // as torch's GELU on CUDA: accurate in the left tail too
    if constexpr (sizeof(T) == sizeof(float))
      return ::normcdff(v);
    else
      return ::normcdf(v);
  }
};

// A pack: consecutive elements that are loaded or stored by one instruction. Their address is aligned to its size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

}  // namespace dlk::cuda

#ifdef __CUDACC__
#include "kernels/cuda/ptx.cuh"
#else
#include <ptx_on_host.h>
#endif
