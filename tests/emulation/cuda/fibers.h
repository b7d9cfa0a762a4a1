// A block of CUDA threads on one CPU thread. Each CUDA thread is a fiber, which runs until it waits at a barrier of its
// warp or of its block. The next fiber is chosen at random, so that the order of accesses changes wherever no barrier
// fixes it. One warp of a block, also chosen at random, lags behind the others.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "races.h"

namespace cuda_emulation {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "cuda_emulation: %s\n", what);
  std::abort();
}

// A copy by cp.async. Its bytes arrive when the thread waits for their group.
struct Copy {
  void* to;
  const void* from;
  int bytes, size;  // the first `bytes` of `size` bytes are copied, the others are 0
};

enum class At { running, warp, block, condition, end };

struct Fiber {
  ucontext_t start;
  jmp_buf here;                                     // swapcontext would cost a system call for every switch
  std::unique_ptr<char[]> stack{new char[kStack]};  // not cleared: pages that are never accessed cost nothing
  bool fresh;
  At at;
  unsigned index, exchanges;
  std::function<bool()> until;            // at a condition
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                 // not yet committed
};

// The values that the lanes of a warp exchange. There are two rounds, because a lane may be one exchange ahead of
// another.
struct Warp {
  static constexpr size_t kBytes = 64;
  alignas(16) unsigned char slot[2][kWarp][kBytes];
  const char* what[kWarp];  // in the last round
  unsigned lanes, waiting;

  void same_or_die() const {
    for (unsigned l = 1; l < lanes; ++l)
      if (what[l] != what[0]) die("the lanes of a warp do different things at once");
  }
};

inline jmp_buf scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;
inline std::vector<Warp> warps;
inline std::vector<std::function<void()>> in_flight;  // operations of the hardware beside the threads, in any order
inline std::mt19937* lots = nullptr;

inline void leave(At at) {
  const races::Quiet quiet;
  current->at = at;
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  races::end_quiet();
  (*body)();
  races::begin_quiet();
  current->at = At::end;
  _longjmp(scheduler, 1);
}

inline void enter(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  current = &fiber;
  fiber.at = At::running;
  if (!fiber.fresh) _longjmp(fiber.here, 1);
  fiber.fresh = false;
  setcontext(&fiber.start);
}

inline bool toss() { return (*lots)() % 2; }

inline void finish_one_in_flight() {
  const size_t drawn = (*lots)() % in_flight.size();
  const auto done = std::move(in_flight[drawn]);
  in_flight.erase(in_flight.begin() + static_cast<ptrdiff_t>(drawn));
  done();
}

// Run the block. resume(index) is called before a thread goes on.
template <class Resume>
void run_block(unsigned threads, std::mt19937& lot, Resume resume) {
  static std::vector<Fiber> fibers;  // kept, so that their stacks are used again
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  std::vector<unsigned> ready, at_condition;
  lots = &lot;
  races::begin_block();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    fiber.fresh = true, fiber.index = t, fiber.exchanges = 0;
    fiber.groups.clear(), fiber.open.clear();
    ++warps[t / kWarp].lanes;
    ready.push_back(t);
  }
  unsigned at_block = 0, ended = 0;
  const unsigned laggard = lot() % warps.size();
  while (ended < threads) {
    while (!ready.empty()) {
      size_t drawn = lot() % ready.size();
      for (int again = 0; again < 16 && ready[drawn] / kWarp == laggard; ++again) drawn = lot() % ready.size();
      const unsigned t = ready[drawn];
      ready[drawn] = ready.back();
      ready.pop_back();
      resume(t);
      races::resume(t);
      enter(fibers[t]);
      if (!in_flight.empty() && lot() % 64 == 0) finish_one_in_flight();
      Warp& warp = warps[t / kWarp];
      at_block += fibers[t].at == At::block;
      ended += fibers[t].at == At::end;
      if (fibers[t].at == At::condition) at_condition.push_back(t);
      if (fibers[t].at == At::warp && ++warp.waiting == warp.lanes) {
        warp.waiting = 0;
        warp.same_or_die();
        if (!std::strcmp(warp.what[0], "syncwarp")) races::passed_warp(t / kWarp);
        for (unsigned lane = 0; lane < warp.lanes; ++lane) ready.push_back(t / kWarp * kWarp + lane);
      }
    }
    if (ended == threads) break;
    if (!at_condition.empty()) {
      if (!in_flight.empty()) finish_one_in_flight();
      auto waits = [&](unsigned t) { return !fibers[t].until(); };
      const auto go_on = std::partition(at_condition.begin(), at_condition.end(), waits);
      ready.assign(go_on, at_condition.end());
      at_condition.erase(go_on, at_condition.end());
      if (ready.empty() && in_flight.empty()) die("a deadlock: threads wait for what will never come");
      continue;
    }
    if (at_block != threads) die("some threads wait at a barrier which others never reach");
    at_block = 0;
    races::passed_block();
    for (unsigned t = 0; t < threads; ++t) ready.push_back(t);
  }
  if (!in_flight.empty()) die("a block ends before what it started in its shared memory");
}

inline void block_barrier() { leave(At::block); }

// Wait until `condition` is true; other threads or the hardware make it true.
inline void wait_until(std::function<bool()> condition) {
  const races::Quiet quiet;
  while (!condition()) {
    current->until = condition;
    leave(At::condition);
  }
}

// The values of all lanes. They are valid until the exchange after the next one.
template <class T>
struct Lanes {
  const unsigned char (*slot)[Warp::kBytes];

  T operator[](unsigned lane) const {
    T v;
    std::memcpy(&v, slot[lane], sizeof v);
    return v;
  }
};

// An exchange between the lanes of a warp. Every lane gives `mine`, and gets the values of all lanes once all lanes
// have reached the same `what`, which is one pointer for all lanes.
template <class T>
Lanes<T> exchange(const T& mine, const char* what) {
  static_assert(sizeof(T) <= Warp::kBytes);
  Warp& warp = warps[current->index / kWarp];
  const races::Quiet quiet;
  const unsigned lane = current->index % kWarp, round = current->exchanges++ % 2;
  std::memcpy(warp.slot[round][lane], &mine, sizeof mine);
  warp.what[lane] = what;
  leave(At::warp);
  return {warp.slot[round]};
}

}  // namespace cuda_emulation
