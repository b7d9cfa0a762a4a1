// What -fsanitize=thread calls, for races.h. An access in the memory of a kernel is compared with those before it.
#include "fibers.h"

#ifdef DLK_TEST_RACES
#include <memory>
#include <unordered_map>

#define DLK_PLAIN __attribute__((no_sanitize("thread")))

// Of this library: where arrays in shared memory are, which are static here.
extern char __bss_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

namespace cuda_emulation::races {
namespace {

struct Access {
  uint32_t launch = 0, block = 0, of_block = 0, of_group = 0, of_warp = 0, thread = 0;
  const void* pc = nullptr;
};
constexpr unsigned kReads = 4;  // that are remembered of a byte
struct Byte {
  Access write, read[kReads];
  unsigned next = 0;
};
constexpr uintptr_t kPage = 1024;
struct Page {
  Byte byte[kPage];
};
uintptr_t shared_begin = 0, shared_end = 0;

DLK_PLAIN Byte& byte_of(uintptr_t at) {
  static std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  static uintptr_t last = 0;
  static Page* page = nullptr;
  if (at / kPage != last || !page) {
    auto& found = pages[last = at / kPage];
    if (!found) found = std::make_unique<Page>();
    page = found.get();
  }
  return page->byte[at % kPage];
}

DLK_PLAIN bool ordered(const Access& a, const Access& now, bool shared) {
  if (a.launch != now.launch) return true;
  if (a.block != now.block) return shared;  // each block has its own shared memory
  if (a.thread == now.thread || a.of_block != now.of_block) return true;
  if (a.thread / 128 == now.thread / 128 && a.of_group != now.of_group) return true;
  return a.thread / kWarp == now.thread / kWarp && a.of_warp != now.of_warp;
}

[[noreturn]] DLK_PLAIN void report(const Access& a, bool wrote, const Access& now, bool writes, uintptr_t at,
                                   bool shared) {
  std::fprintf(stderr,
               "races: %s memory %p: thread %u of block %u %s (%p), thread %u of block %u %s (%p); library at %p\n",
               shared ? "shared" : "global", reinterpret_cast<void*>(at), a.thread, a.block, wrote ? "writes" : "reads",
               a.pc, now.thread, now.block, writes ? "writes" : "reads", now.pc, static_cast<void*>(&__bss_start));
  die("a race");
}

}  // namespace

void shared_memory(const void* begin, size_t bytes) {
  shared_begin = reinterpret_cast<uintptr_t>(begin), shared_end = shared_begin + bytes;
}

DLK_PLAIN void access(const void* pointer, size_t bytes, bool writes, const void* pc) {
  static bool inside = false;
  if (inside || !current) return;
  const auto first = reinterpret_cast<uintptr_t>(pointer), stack = reinterpret_cast<uintptr_t>(current->stack.get());
  if (first >= stack && first < stack + kStack) return;
  inside = true;
  const bool is_static =
      first >= reinterpret_cast<uintptr_t>(&__bss_start) && first < reinterpret_cast<uintptr_t>(&_end);
  const bool shared = is_static || (first >= shared_begin && first < shared_end);
  const Access now{
      clock.launch, clock.block, clock.of_block, clock.of_group[thread / 128], clock.of_warp[thread / kWarp],
      thread,       pc};
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Byte& byte = byte_of(at);
    if (!ordered(byte.write, now, shared)) report(byte.write, true, now, writes, at, shared);
    if (!writes) {
      byte.read[byte.next++ % kReads] = now;
      continue;
    }
    for (const Access& read : byte.read)
      if (!ordered(read, now, shared)) report(read, false, now, writes, at, shared);
    byte.write = now;
  }
  inside = false;
}

}  // namespace cuda_emulation::races

namespace {
DLK_PLAIN void access(const void* p, size_t bytes, bool writes, const void* pc) {
  using cuda_emulation::races::quiet;
  if (!quiet && p != &quiet) cuda_emulation::races::access(p, bytes, writes, pc);
}
}  // namespace
#define DLK_ACCESS(size)                                                                                       \
  DLK_PLAIN void __tsan_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); }           \
  DLK_PLAIN void __tsan_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); }           \
  DLK_PLAIN void __tsan_unaligned_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); } \
  DLK_PLAIN void __tsan_unaligned_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); }
// Atomics of the library; kernels have none.
#define DLK_ATOMIC(bits, Type)                                                    \
  DLK_PLAIN Type __tsan_atomic##bits##_load(const volatile Type* p, int) {        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                  \
  }                                                                               \
  DLK_PLAIN Type __tsan_atomic##bits##_fetch_add(volatile Type* p, Type v, int) { \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                            \
  }
extern "C" {
DLK_ACCESS(1)
DLK_ACCESS(2) DLK_ACCESS(4) DLK_ACCESS(8) DLK_ACCESS(16) DLK_PLAIN void __tsan_read_range(void* p, size_t n) {
  access(p, n, false, __builtin_return_address(0));
}
DLK_PLAIN void __tsan_write_range(void* p, size_t n) { access(p, n, true, __builtin_return_address(0)); }
DLK_ATOMIC(8, uint8_t) DLK_ATOMIC(32, uint32_t) DLK_ATOMIC(64, uint64_t) DLK_PLAIN void __tsan_init() {}
DLK_PLAIN void __tsan_func_entry(void*) {}
DLK_PLAIN void __tsan_func_exit() {}
DLK_PLAIN void __tsan_vptr_update(void*, void*) {}
DLK_PLAIN void __tsan_vptr_read(void*) {}
}
#endif
