// Memory between two forbidden pages. An access past its end, or far before its beginning, faults at once.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cuda_emulation {

// The last byte is directly before the forbidden page, so the first byte has the alignment of `bytes`. The memory is
// filled with the bits of NaN.
struct Guarded {
  unsigned char* data = nullptr;
  void* map = nullptr;
  size_t length = 0;

  Guarded() = default;
  Guarded(const Guarded&) = delete;
  ~Guarded() { release(); }

  void allocate(size_t bytes) {
    release();
    const size_t page = static_cast<size_t>(getpagesize()), body = (bytes + page - 1) / page * page;
    length = body + 2 * page;
    map = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    auto* begin = static_cast<unsigned char*>(map) + page;
    if (body) mprotect(begin, body, PROT_READ | PROT_WRITE);
    data = begin + body - bytes;
    std::memset(begin, 0xff, body);
  }
  void release() {
    if (map) munmap(map, length);
    map = nullptr;
  }
};

inline sigjmp_buf fault;

// Call f, and return false if it accessed forbidden memory.
template <class F>
bool without_fault(F&& f) {
  static unsigned char stack[64 * 1024];  // the fault may be on a fiber's
  stack_t mine{}, before_stack{};
  mine.ss_sp = stack, mine.ss_size = sizeof stack;
  sigaltstack(&mine, &before_stack);
  struct sigaction action{}, before_segv{}, before_bus{};
  action.sa_handler = [](int) { siglongjmp(fault, 1); };
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  const bool faulted = sigsetjmp(fault, 1);
  if (!faulted) f();
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  sigaltstack(&before_stack, nullptr);
  return !faulted;
}

}  // namespace cuda_emulation
