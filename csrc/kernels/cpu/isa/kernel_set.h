// All kernels for one instruction set, in reading order, and the table that isa.cpp chooses from. A ukernel_*.cpp
// defines the instruction set and its tile, then includes this file.
#define DLK_TEXT_(x) #x
#define DLK_TEXT(x) DLK_TEXT_(x)

#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/isa/vmath.h"
#include "kernels/cpu/gemm/gemm_traits.h"
#include "kernels/cpu/gemm/strided_rows.h"
#include "kernels/cpu/gemm/epilogue.h"
#include "kernels/cpu/gemm/ukernel.h"
#include "kernels/cpu/isa/peak_loop.h"
#include "kernels/cpu/gemm/tiling.h"
#include "kernels/cpu/gemm/packing.h"
#include "kernels/cpu/gemm/ahead.h"
#include "kernels/cpu/gemm/transposed.h"
#include "kernels/cpu/gemm/block.h"
#include "kernels/cpu/gemm/gemm.h"
#include "kernels/cpu/gemm/few_rows.h"
#include "kernels/cpu/gemm/few_columns.h"
#include "kernels/cpu/mlp/fused_mlp.h"
#include "kernels/cpu/elementwise/passes.h"
#include "kernels/cpu/elementwise/glu_passes.h"
#include "kernels/cpu/elementwise/update.h"
#include "kernels/cpu/losses/losses.h"

namespace dlk::cpu::DLK_ISA {

template <class E>
constexpr KernelTable make_kernel_table(const char* ukernel) {
  return {ukernel,
          &act_pass_with<typename E::Elem>,
          &bias_act_pass_with<typename E::Elem>,
          &derivative_pass_with<typename E::Elem>,
          packed_product<E>(),
          {&few_forward_with<E>, 1, kFewRowsForward},
          {},
          &few_dgrad_with<typename E::Elem, typename E::ElemB, typename E::ElemC>,
          &few_wgrad_with<typename E::Elem, typename E::ElemB, typename E::ElemC>,
          &few_columns_forward_with<E>,
          &few_columns_backward_with<typename E::Elem>,
          &grad_pass_with<typename E::Elem>,
          &glu_pass_with<typename E::Elem>,
          &glu_grad_pass_with<typename E::Elem>,
          fused_mlp<E>(),
          losses<typename E::Elem>(),
          update_of<typename E::Elem>(),
          &peak_loop<E>};
}

}  // namespace dlk::cpu::DLK_ISA
