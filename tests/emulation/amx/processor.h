// A processor and a Linux system with AMX, for the questions that csrc/kernels/cpu asks them. Included before
// everything else, like tiles.h. The environment variable AMX_ON_HOST names what is missing or broken: "cpuid", "xcr0",
// "permission", "products".
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>  // before syscall is a macro: its C++20 half calls it
#include <string>

#include "tiles.h"

namespace amx_emulation {

inline bool lacks(const char* what) {
  const char* missing = std::getenv("AMX_ON_HOST");
  return missing && std::string(missing) == what;
}

inline int cpuid(unsigned leaf, unsigned part, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  const int known = __get_cpuid_count(leaf, part, a, b, c, d);
  const unsigned amx = 1u << 22 | 1u << 24;  // bf16, tiles
  if (leaf == 7 && part == 0) *d = (*d & ~amx) | (lacks("cpuid") ? 0 : amx);
  if (leaf == 7 && part == 1) *a |= 1u << 21;  // AMX-FP16
  return known;
}

inline unsigned long long xgetbv(unsigned) { return lacks("xcr0") ? 0xe7 : 0x600e7; }

inline long arch_prctl(long number, long code, long argument) {
  defect = lacks("products");
  const bool request = number == SYS_arch_prctl && code == 0x1023 && argument == 18;
  return request && !lacks("permission") ? 0 : -1;
}

}  // namespace amx_emulation

#define __get_cpuid_count amx_emulation::cpuid
#define _xgetbv amx_emulation::xgetbv
#define syscall amx_emulation::arch_prctl
