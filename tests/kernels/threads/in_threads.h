// cpu::Parallel (csrc/kernels/cpu/kernels.h) on std::threads, for kernels that tests run without torch.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace {

int threads_in_use = 1;

// Split the tasks in one contiguous range per thread, and run each range in a thread of its own. A single thread is the
// caller's.
void in_threads(int64_t tasks, const void* context, void (*body)(const void*, int64_t, int64_t)) {
  if (threads_in_use == 1) return body(context, 0, tasks);
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < threads_in_use; ++t) {
    const int64_t begin = tasks * t / threads_in_use, end = tasks * (t + 1) / threads_in_use;
    if (begin < end) threads.emplace_back(body, context, begin, end);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
