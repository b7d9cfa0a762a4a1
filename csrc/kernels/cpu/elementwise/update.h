// The update of parameters by Adam, AdamW or SGD: torch's formulas in the order of its kernels (fused=True), so that both
// round alike.
//
// torch goes through a tensor in registers of 32 bytes and takes the elements behind the last whole register one by one. Its
// compiler fused one product of a·b + c·d with the sum, the second one in registers and the first one behind them.
// csrc/ops/cpu/update.cpp compares the bits with torch's before it calls these kernels.
namespace dlk::cpu::DLK_ISA {

constexpr int64_t kUpdateChunk = 4096;  // elements of a task: whole registers of torch's

// a·b + c·d
template <bool in_register, class V>
DLK_INLINE V sum_of_products(V a, V b, V c, V d) {
  return in_register ? fma(c, d, a * b) : fma(a, b, c * d);
}

// max(a, b); in torch's registers NaN if either is NaN, else a if b is NaN.
template <bool in_register, class V>
DLK_INLINE V larger(V a, V b) {
  const V most = a < b ? b : a;
  return in_register ? (b != b ? b : most) : most;
}

// Adam and AdamW, constants of one tensor.
template <class T>
struct AdamUpdate {
  using V = Vec<T>;
  V weight_decay, mean_weight, beta2, square_weight, correction, eps, step;
  bool maximize, decays, decoupled, small;

  DLK_INLINE AdamUpdate of(const Update& u, const UpdatedTensor& t) {
    using O = Ops<T>;
    const T weight = (T)(1 - u.beta1);
    const bool small = weight > (T)-0.5 && weight < (T)0.5, decoupled = u.rule == UpdateRule::adamw;
    return {O::lit(decoupled ? 1 - u.lr * u.weight_decay : u.weight_decay),
            V{} + (small ? weight : weight - (T)1),
            O::lit(u.beta2),
            O::lit(1 - u.beta2),
            O::lit(t.correction),
            O::lit(u.eps),
            O::lit(-t.step_size),
            u.maximize,
            u.weight_decay != 0,
            decoupled,
            small};
  }

  template <bool in_register>
  DLK_HD void apply(const UpdatedTensor& t, int64_t i, int64_t n) const {
    T *p = (T*)t.p + i, *mean = (T*)t.mean + i, *square = (T*)t.square + i;
    V w = load_partial(p, 1, n), g = load_partial((const T*)t.g + i, 1, n), m = load_partial(mean, 1, n);
    if (maximize) g = -g;
    if (decays && decoupled) w *= weight_decay;
    if (decays && !decoupled) g = fma(w, weight_decay, g);
    m = fma(mean_weight, g - m, small ? m : g);
    V s = sum_of_products<in_register>(load_partial(square, 1, n), beta2, square_weight * g, g);
    store_partial(mean, m, n);
    store_partial(square, s, n);
    if (t.max_square) {
      T* max_square = (T*)t.max_square + i;
      s = larger<in_register>(load_partial(max_square, 1, n), s);
      store_partial(max_square, s, n);
    }
    store_partial(p, w + step * m / (square_root(s) / correction + eps), n);
  }
};

template <class T>
struct SgdUpdate {
  using V = Vec<T>;
  V weight_decay, momentum, grad_weight, step;
  bool maximize, decays, nesterov;

  DLK_INLINE SgdUpdate of(const Update& u, const UpdatedTensor&) {
    using O = Ops<T>;
    return {O::lit(u.weight_decay), O::lit(u.beta1), O::lit(1 - u.dampening), O::lit(-u.lr), u.maximize,
            u.weight_decay != 0,    u.nesterov};
  }

  template <bool in_register>
  DLK_HD void apply(const UpdatedTensor& t, int64_t i, int64_t n) const {
    T* p = (T*)t.p + i;
    const V w = load_partial(p, 1, n);
    V g = load_partial((const T*)t.g + i, 1, n);
    if (maximize) g = -g;
    if (decays) g = fma(w, weight_decay, g);
    if (t.mean) {
      T* mean = (T*)t.mean + i;
      const V m = sum_of_products<in_register>(load_partial(mean, 1, n), momentum, g, grad_weight);
      store_partial(mean, m, n);
      g = nesterov ? fma(m, momentum, g) : m;
    }
    store_partial(p, fma(g, step, w), n);
  }
};

template <class T, class Rule>
void update_elements(const Update& u, const UpdatedTensor& t, int64_t from, int64_t to) {
  const Rule rule = Rule::of(u, t);
  const int64_t in_registers = min(to, t.n - t.n % (int64_t)(32 / sizeof(T)));
  int64_t i = from;
  for (; i + kLanes<T> <= in_registers; i += kLanes<T>) rule.template apply<true>(t, i, kLanes<T>);
  if (i < in_registers) rule.template apply<true>(t, i, in_registers - i);
  for (i = max(from, in_registers); i < to; i += kLanes<T>) rule.template apply<false>(t, i, min(kLanes<T>, to - i));
}

template <class T>
void update_with(const Update& u, const Parallel& parallel) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < u.count; ++i) chunks += ceil_div(u.tensors[i].n, kUpdateChunk);
  parallel.run(chunks, &u, [](const void* context, int64_t begin, int64_t end) {
    const auto& u = *(const Update*)context;
    const auto run = u.rule == UpdateRule::sgd ? &update_elements<T, SgdUpdate<T>> : &update_elements<T, AdamUpdate<T>>;
    for (int64_t i = 0; i < u.count && end > 0; ++i) {
      const UpdatedTensor& t = u.tensors[i];
      const int64_t chunks = ceil_div(t.n, kUpdateChunk), first = max(begin, 0);
      if (first < chunks) run(u, t, first * kUpdateChunk, min(end * kUpdateChunk, t.n));
      begin -= chunks, end -= chunks;
    }
  });
}

template <class T>
constexpr auto update_of() -> decltype(KernelTable::update) {
  if constexpr (sizeof(T) >= sizeof(float))
    return &update_with<T>;
  else
    return nullptr;
}

}  // namespace dlk::cpu::DLK_ISA
