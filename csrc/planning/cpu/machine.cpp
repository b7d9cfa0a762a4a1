#include "planning/cpu/machine.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dlk::cpu {
namespace {

Forced forced() {
  const char* text = std::getenv("DLKERNELS_CPU_GEMM");
  const std::string s = text ? text : "";
  if (s.empty()) return Forced::no;
  if (s == "own") return Forced::own;
  if (s == "aten") return Forced::aten;
  throw std::runtime_error("DLKERNELS_CPU_GEMM must be own or aten, got '" + s + "'");
}

}  // namespace

Machine this_machine(int threads, bool bf16_products) {
  static const Machine machine = {&kernels(), forced(), isa_capped(), cpu_features().amx_fp16, amx_refused(), false, 1};
  Machine now = machine;
  now.bf16_products = bf16_products;
  now.threads = threads;
  now.routes = cpu_routes();
  now.maker = cpu_features().maker;
  return now;
}

}  // namespace dlk::cpu
