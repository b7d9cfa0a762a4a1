// A detector of races, for kernels on the host: two accesses to a byte by different threads, at least one of them a
// write, that no barrier orders. The scheduler of fibers.h shows a race only if it changes a result in the order that it
// drew; this sees every race on the way that the kernel takes, in any order.
//
// With DLK_TEST_RACES the kernels are compiled with -fsanitize=thread, which calls a function for every access. These
// functions are races.cpp's and not libtsan's, because barriers of CUDA threads are all the order that there is. Only
// barriers order: on a GPU the exchanges of a warp (shuffles, ldmatrix, mma) do not.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_emulation::races {

#ifdef DLK_TEST_RACES
// The functions of the emulation make one of these: their own accesses are none of the kernel's. Functions that call each
// other make several, so each restores what was before it.
inline bool quiet = true;
struct Quiet {
  const bool before = quiet;
  Quiet() { quiet = true; }
  ~Quiet() { quiet = before; }
};
// The time of a thread: what the barriers that it has passed make of an access of another thread.
struct Clock {
  uint32_t launch = 0, block = 0;                   // counted over all launches
  uint32_t of_block = 0, of_group[8], of_warp[32];  // barriers that were passed
};
inline Clock clock;
inline unsigned thread = 0;  // that runs

void access(const void* at, size_t bytes, bool writes, const void* pc);
void shared_memory(const void* begin, size_t bytes);  // the dynamic one

inline void begin_quiet() { quiet = true; }
inline void end_quiet() { quiet = false; }
inline void begin_launch() { ++clock.launch; }
inline void begin_block() { ++clock.block; }
inline void passed_block() { ++clock.of_block; }
inline void passed_group(unsigned group) { ++clock.of_group[group]; }
inline void passed_warp(unsigned warp) { ++clock.of_warp[warp]; }
inline void resume(unsigned t) { thread = t; }
#else
struct Quiet {
  Quiet() {}
};
inline void access(const void*, size_t, bool, const void*) {}
inline void begin_quiet() {}
inline void end_quiet() {}
inline void shared_memory(const void*, size_t) {}
inline void begin_launch() {}
inline void begin_block() {}
inline void passed_block() {}
inline void passed_group(unsigned) {}
inline void passed_warp(unsigned) {}
inline void resume(unsigned) {}
#endif

}  // namespace cuda_emulation::races
