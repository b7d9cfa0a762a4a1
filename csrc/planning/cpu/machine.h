// The facts about this processor and this process that a plan depends on.
#pragma once

#include <cstring>

#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/kernels.h"
#include "planning/problem.h"
#include "planning/routes.h"

namespace dlk::cpu {

// DLKERNELS_CPU_GEMM=own|aten takes the choice between our products and torch's away from the rules: for tests, and to
// measure both.
enum class Forced { no, own, aten };

struct Machine {
  const Kernels* kernels;  // the kernel set in use
  Forced forced;
  bool isa_capped;                     // by DLKERNELS_CPU_ISA
  bool amx_fp16;                       // the processor has it
  bool amx_refused;                    // our AMX products failed their self-check here
  bool bf16_products;                  // torch lets f32 products run in bf16
  int threads;                         // torch's
  const RouteTable* routes = nullptr;  // the table in use; nullptr: none
  Maker maker = Maker::amd;

  bool runs(const char* isa) const { return !std::strcmp(kernels->isa, isa); }
  bool runs_avx512() const { return runs("avx512") || runs("avx512_bf16") || runs("amx"); }
  // Waking threads costs some microseconds, which is 100 thousand multiplications.
  int threads_for(int64_t operations) const { return operations < 100000 ? 1 : threads; }
  const KernelTable& table(DType dtype) const { return kernels->table[static_cast<int>(dtype)]; }
  // Layers under autocast have kernels that convert f32 parameters as they multiply. The same for all layers of a process.
  bool converts_parameters() const { return kernels->autocast.ukernel && forced != Forced::aten && !amx_refused; }
  // The kernels of such a layer; nullptr without casts.
  const AutocastLayer* autocast(Casts casts) const {
    if (casts == Casts::none) return nullptr;
    return casts == Casts::f32_x ? &kernels->autocast.f32_x : &kernels->autocast.bf16_x;
  }
  // Our packed product for tensors of one dtype. f32 is multiplied in bf16 where torch allows it.
  const PackedProduct& packed(DType dtype) const {
    const bool in_bf16 = dtype == DType::f32 && bf16_products && kernels->f32_in_bf16.ukernel;
    return in_bf16 ? kernels->f32_in_bf16.packed : table(dtype).packed;
  }
  // Our packed product of a layer.
  const PackedProduct& packed(const Problem& p, Op op) const {
    const AutocastLayer* layer = autocast(p.casts);
    if (!layer) return packed(p.dtype);
    return op == Op::forward ? layer->packed.forward : op == Op::dgrad ? layer->packed.dgrad : layer->packed.wgrad;
  }
};

// Throws std::runtime_error for values of the environment variables that mean nothing.
Machine this_machine(int threads, bool bf16_products);

}  // namespace dlk::cpu
