// A layer under autocast: weight and bias in f32, tensors between layers (y, z and gradients of y) in bf16, x in
// either. The f32 operands of a product are rounded while they are packed, or, in the dot products of few rows, in
// registers: no copy in bf16 is made. y has the bits that casts in front of the layer give. A gradient has the dtype of
// its tensor; f32 gradients are sums that are not rounded to bf16.
//
//            A                     B               C
//   forward  x   f32 or bf16       weightᵀ f32     y   bf16
//   dgrad    dz  bf16              weight  f32     dx  f32 or bf16, as x
//   wgrad    dzᵀ bf16              x f32 or bf16   dw  f32
namespace dlk::cpu::DLK_ISA {

template <template <class, class, class> class Pairs, class X>
constexpr PackedLayer packed_autocast() {
  return {packed_product<Pairs<X, float, Bf16>>(), packed_product<Pairs<Bf16, float, X>>(),
          packed_product<Pairs<Bf16, X, float>>()};
}

}  // namespace dlk::cpu::DLK_ISA
