#include "kernels/cpu/huge_pages.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dlk::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

uintptr_t round_up(uintptr_t value, uintptr_t step) { return (value + step - 1) / step * step; }

void advise(const void* begin, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = round_up(at, kHugePage), last = (at + bytes) / kHugePage * kHugePage;
  // A kernel without huge pages refuses; the memory is good without them.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

bool huge_pages_wanted() {
  static const bool wanted = [] {
    const char* text = std::getenv("DLKERNELS_HUGE_PAGES");
    const std::string s = text ? text : "";
    if (!s.empty() && s != "0" && s != "1")
      throw std::runtime_error("DLKERNELS_HUGE_PAGES must be 0 or 1, got '" + s + "'");
    return s != "0";
  }();
  return wanted;
}

void ask_for_huge_pages(const void* begin, size_t bytes) {
  if (huge_pages_wanted() && bytes >= kHugePagesFrom) advise(begin, bytes);
}

void* allocate_scratch(size_t bytes) {
  const bool huge = huge_pages_wanted() && bytes >= kHugePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, huge ? kHugePage : 64, bytes)) return nullptr;
  if (huge) advise(memory, bytes);
  return memory;
}

}  // namespace dlk::cpu
