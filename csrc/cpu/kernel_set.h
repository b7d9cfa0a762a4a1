// Everything above, for one instruction set: the entry points that isa.cpp chooses from.
#define DLK_TEXT_(x) #x
#define DLK_TEXT(x) DLK_TEXT_(x)

#include "vec.h"
#include "vmath.h"
#include "engine.h"
#include "runs.h"
#include "epilogue.h"
#include "ukernel.h"
#include "gemm.h"
#include "few_rows.h"
#include "few_columns.h"
#include "chain.h"
#include "passes.h"
#include "losses.h"

namespace dlk::cpu::DLK_ISA {

template <class E>
constexpr Engine engine(const char* ukernel) {
  return {ukernel,
          &act_pass_with<typename E::Elem>,
          packed_product<E>(),
          {&few_forward_with<E>, 1, kFewRowsForward},
          {},
          &few_dgrad_with<typename E::Elem, typename E::ElemB, typename E::ElemC>,
          &few_wgrad_with<typename E::Elem, typename E::ElemB, typename E::ElemC>,
          &few_columns_forward_with<E>,
          &few_columns_backward_with<typename E::Elem>,
          &grad_pass_with<typename E::Elem>,
          kChainFeatures<E>,
          &chain_forward_with<E>,
          &chain_backward_with<E>,
          losses<typename E::Elem>()};
}

}  // namespace dlk::cpu::DLK_ISA
