// The epilogue takes a micro-tile of C from its accumulators to memory, while it is in L1: bias, activation, rounding.
//
// The fields of p are read before the loops: inside a loop the compiler would read them again after every store. At 1024,
// 100→256 on AVX2 that made the whole product 3 % slower.
namespace dlk::cpu::DLK_ISA {

// Add the bias to rows × cols accumulators at acc (padded to whole registers), apply the activation, round once, and
// store at (i0, j0) of C. The elements of C are T, or accumulators; with kAdd the result is added to those. The bias is
// rounded to T where it is stored in another type.
template <class T, class Bias, class Act, class C = T, bool kAdd = false>
void epilogue(const Gemm& p, const Acc<T>* acc, int64_t ld, int64_t i0, int64_t j0, int64_t rows, int64_t cols) {
  using O = Ops<Acc<T>>;
  constexpr int64_t kVL = kLanes<T>;
  const auto slope = O::lit(p.act.slope);
  const int64_t pitch = p.n, first = i0 * pitch + j0;
  C* const c = (C*)p.c + first;
  T* const z_out = p.z ? (T*)p.z + first : nullptr;
  for (int64_t j = 0; j < cols; j += kVL) {
    const int64_t n = cols - j < kVL ? cols - j : kVL;
    auto bias = p.bias ? load_partial((const Bias*)p.bias + j0 + j, 1, n) : O::lit(0);
    if constexpr (!kIsSame<Bias, T>) bias = rounded<T>(bias);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * pitch + j;
      auto z = load(acc + i * ld + j) + bias;
      if constexpr (kAdd) z = load_partial(c + at, 1, n) + z;
      if (z_out) store_partial(z_out + at, z, n);
      store_partial(c + at, Act::template value<O>(z, slope), n);
    }
  }
}

// The epilogue of a dgrad that makes dz of the layer below: it multiplies dx by that layer's act'(below_saved).
template <class T, class Act>
void epilogue_below(const Gemm& p, const Acc<T>* acc, int64_t ld, int64_t i0, int64_t j0, int64_t rows, int64_t cols) {
  using O = Ops<Acc<T>>;
  constexpr int64_t kVL = kLanes<T>;
  const auto slope = O::lit(p.below_act.slope);
  const int64_t pitch = p.n, first = i0 * pitch + j0;
  T* const c = (T*)p.c + first;
  const T* const below = (const T*)p.below_saved + first;
  for (int64_t j = 0; j < cols; j += kVL) {
    const int64_t n = cols - j < kVL ? cols - j : kVL;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * pitch + j;
      const auto saved = load_partial(below + at, 1, n);
      store_partial(c + at, Act::template grad<O>(load(acc + i * ld + j), saved, slope), n);
    }
  }
}

// The epilogue of a gated layer's forward. `gate` and `up` are accumulators of the same micro-tile.
template <class T, class Bias, class Act>
void epilogue_glu(const Gemm& p, const Acc<T>* gate, const Acc<T>* up, int64_t ld, int64_t i0, int64_t j0, int64_t rows,
                  int64_t cols) {
  using O = Ops<Acc<T>>;
  constexpr int64_t kVL = kLanes<T>;
  const auto slope = O::lit(p.act.slope);
  auto bias_at = [](const void* bias, int64_t at, int64_t n) {
    auto b = bias ? load_partial((const Bias*)bias + at, 1, n) : O::lit(0);
    if constexpr (!kIsSame<Bias, T>) b = rounded<T>(b);
    return b;
  };
  const int64_t pitch = p.n, z_pitch = p.z_pitch, z_first = i0 * z_pitch + j0;
  T* const c = (T*)p.c + i0 * pitch + j0;
  T* const z_out = p.z ? (T*)p.z + z_first : nullptr;
  T* const z_up_out = p.z ? (T*)p.z_up + z_first : nullptr;
  for (int64_t j = 0; j < cols; j += kVL) {
    const int64_t n = cols - j < kVL ? cols - j : kVL;
    const auto bias_gate = bias_at(p.bias, j0 + j, n), bias_up = bias_at(p.bias_up, j0 + j, n);
    for (int64_t i = 0; i < rows; ++i) {
      const auto z = load(gate + i * ld + j) + bias_gate, z_up = load(up + i * ld + j) + bias_up;
      if (z_out) {
        store_partial(z_out + i * z_pitch + j, z, n);
        store_partial(z_up_out + i * z_pitch + j, z_up, n);
      }
      store_partial(c + i * pitch + j, Act::template value<O>(z, slope) * z_up, n);
    }
  }
}

template <class T>
using GluEpilogueFn = void (*)(const Gemm&, const Acc<T>*, const Acc<T>*, int64_t, int64_t, int64_t, int64_t, int64_t);

// Return the epilogue of a gated layer; nullptr if p is not one.
template <class T, class Bias>
GluEpilogueFn<T> glu_epilogue_of(const Gemm& p) {
  if (!p.gated) return nullptr;
  return with_activation(p.act.kind,
                         [](auto functor) -> GluEpilogueFn<T> { return &epilogue_glu<T, Bias, decltype(functor)>; });
}

template <class T>
using EpilogueFn = void (*)(const Gemm&, const Acc<T>*, int64_t, int64_t, int64_t, int64_t, int64_t);

// Return the epilogue that p asks for.
template <class T, class Bias>
EpilogueFn<T> epilogue_of(const Gemm& p) {
  if (p.below_saved)
    return with_activation(p.below_act.kind,
                           [](auto functor) -> EpilogueFn<T> { return &epilogue_below<T, decltype(functor)>; });
  if (p.output_mode == OutputMode::uncast) return &epilogue<T, Bias, Identity, Acc<T>>;
  if (p.output_mode == OutputMode::accumulate) return &epilogue<T, Bias, Identity, Acc<T>, true>;
  // In backward `act` belongs to dz, and the product has no activation.
  const Act kind = p.saved.data ? Act::none : p.act.kind;
  return with_activation(kind, [](auto functor) -> EpilogueFn<T> { return &epilogue<T, Bias, decltype(functor)>; });
}

}  // namespace dlk::cpu::DLK_ISA
