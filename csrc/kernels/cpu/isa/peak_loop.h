// The arithmetic peak of a core: multiply-adds whose operands never leave the registers.
namespace dlk::cpu::DLK_ISA {

// Run `steps` steps, each with one multiply-add per accumulator of a micro-tile, and return their operations. There are
// more accumulators than multiply-adds in flight, so none waits for another.
template <class E>
int64_t peak_loop(int64_t steps) {
  using M = typename E::Multiply;
  using V = typename E::V;
  constexpr int64_t sums = kMR * kNV, lanes = sizeof(V) / sizeof(typename E::Acc);
  V acc[sums];
  // The sums differ, so that the compiler cannot replace one by another. 2⁻²⁰ in every type: the sums stay finite.
#pragma GCC unroll 32
  for (int64_t i = 0; i < sums; ++i) acc[i] = V{} + (typename E::Acc)i;
  V a = V{} + (typename E::Acc)0x1p-20, b = V{} + (typename E::Acc)1;
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 32
    for (int64_t i = 0; i < sums; ++i) acc[i] = M::multiply_add(acc[i], a, b);
  V total = acc[0];
  for (int64_t i = 1; i < sums; ++i) total += acc[i];
  volatile typename E::Acc kept = total[0];
  (void)kept;
  return steps * sums * lanes * 2 * E::kStep;
}

}  // namespace dlk::cpu::DLK_ISA
