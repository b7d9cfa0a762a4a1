// Prints how the kernels of ISA cut a product in f32. Arguments: m n k threads, and 1 if A lies along its columns. Prints: rows
// and columns of a tile, tasks.
#include <cstdio>
#include <cstdlib>

#include SOURCE

int main(int, char** argv) {
  using namespace dlk::cpu::ISA;
  dlk::Gemm p{};
  p.m = std::atoll(argv[1]), p.n = std::atoll(argv[2]), p.k = std::atoll(argv[3]), p.splits = 1;
  p.a = std::atoi(argv[5]) ? dlk::contiguous_view(p.m).transposed() : dlk::contiguous_view(p.k);
  const Tiling t = tile<Convert<float>>(p, std::atoi(argv[4]));
  const int64_t rows = ceil_div(ceil_div(p.m, kMR), t.mt) * kMR;
  std::printf("%ld %ld %ld\n", long(rows), long(t.nc), long(t.tasks()));
}
