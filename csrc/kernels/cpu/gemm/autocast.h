// A layer under autocast: weight and bias are f32; y, z and the gradient of y are bf16; x is either. The f32 operands
// of a product are rounded while they are packed, or in registers where the dot products of few rows read them, so that
// no whole copy of weight in bf16 is made in memory. y has the same bits as with casts in front of the layer. Each
// gradient has the dtype of its tensor; f32 gradients are stored without rounding.
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
