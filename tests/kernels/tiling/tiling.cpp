// Prints how the portable kernels cut a product in f32. Arguments: m n k threads. Prints: rows and columns of a tile, tasks.
#include <cstdio>
#include <cstdlib>

#include "kernels/cpu/isa/ukernel_portable.cpp"

int main(int, char** argv) {
  using namespace dlk::cpu::portable;
  dlk::Gemm p{};
  p.m = std::atoll(argv[1]), p.n = std::atoll(argv[2]), p.k = std::atoll(argv[3]), p.splits = 1;
  const Tiling t = tile<Convert<float>>(p, std::atoi(argv[4]));
  const int64_t rows = ceil_div(ceil_div(p.m, kMR), t.mt) * kMR;
  std::printf("%ld %ld %ld\n", long(rows), long(t.nc), long(t.tasks()));
}
