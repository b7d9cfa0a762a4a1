// How sums are cut and how much scratch they need: functions of shapes alone, which planning and the kernels call.
#include "kernels/cpu/kernels.h"

namespace dlk::cpu {

int gemm_splits(int64_t m, int64_t n, int64_t k) {
  // The wgrad of a tall batch has few tiles and a long k. k is cut so that about 16 tasks exist. Each slice keeps at
  // least 2048 steps, which makes its pass over the partial sums (m·n per slice) cheap beside its m·n·2048 FMAs.
  const int64_t tiles = ((m + 127) / 128) * ((n + 127) / 128);
  if (tiles == 0) return 1;
  const int64_t wanted = 16 / tiles;
  const int64_t most = k / 2048;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 2 ? 1 : static_cast<int>(splits);
}

int64_t partials_size(const Gemm& p) { return p.splits < 2 ? 0 : p.splits * (p.m * p.n + (p.row_sum ? p.m : 0)); }

int64_t fused_mlp_parameters(const FusedMlp& p) {
  int64_t count = 0;
  for (int l = 0; l < p.layers; ++l)
    count += p.layer[l].n * fused_mlp_pitch(p.layer[l].k) + fused_mlp_pitch(p.layer[l].n);
  return count;
}

}  // namespace dlk::cpu
