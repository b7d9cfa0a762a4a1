// Elementwise passes, for calls whose product is not ours.
//
//   grad_pass  dz = g · act'(saved) and dbias = Σ dz over rows: in front of a library's product, which reads dz from
//              memory, and where no wgrad of ours adds up dbias while it packs dz
//   act_pass   y = act(z): behind a library's product
//   derivative_pass  t · a derivative of an activation: for second derivatives of a network
//   bias_act_pass  y = act(z + bias): behind one without a bias. A library adds the bias by writing it to every row of C
//                  first, which is another pass over C
//
// Rows are cut in slices (slice_rows). One thread sums a slice, and the slices are summed in order, so that the bits
// are the same on any number of threads.
namespace dlk::cpu::DLK_ISA {

// The tasks of a pass that sums columns: slices of rows times panels of columns. Panels do not change a sum. They are
// as wide as leaves the sums in L1, so that rows are read as long runs, which a hardware prefetcher follows. Where there
// are few slices, there are as many panels as threads, and a thread gets all slices of a panel, because the last slice
// may be shorter.
struct ColumnTasks {
  int64_t slices, width, panels;

  static ColumnTasks of(int64_t m, int64_t n, int threads, int64_t widest) {
    constexpr int64_t kLeast = 128;  // columns of a panel
    const int64_t count = dlk::cpu::slices(m), all = ceil_div(n, widest);
    const int64_t for_threads = count < 2 * threads ? min(threads, ceil_div(n, kLeast)) : 1;
    const int64_t width = round_up(ceil_div(n, max(all, for_threads)), kF32Lanes);
    return {count, width, ceil_div(n, width)};
  }
  int64_t count() const { return slices * panels; }
  int64_t slice(int64_t task) const { return task % slices; }
  int64_t column(int64_t task) const { return task / slices * width; }
};

// Some rows of dz, columns j to j + n, and their sums where they are wanted. The buffer is one row long.
template <class T>
void grad_rows(const GradPass& p, const RowSource<Convert<T>>& g, Acc<T>* buffer, ColumnSum<Convert<T>>* sum,
               int64_t i0, int64_t rows, int64_t j, int64_t n) {
  T* const out = p.dz ? (T*)p.dz + i0 * p.n + j : nullptr;
  if constexpr (kIsSame<T, Acc<T>>) {
    // The rows are summed together where they lie in memory: in dz, or in g if that is dz already.
    const bool g_is_dz = !out && !p.saved.data && p.g.col_stride == 1;
    if (out)
      for (int64_t i = 0; i < rows; ++i) RowSource<Convert<T>>::along_row(g, out + i * p.n, i0 + i, j, n);
    if (sum && (out || g_is_dz)) {
      const T* const first = out ? out : (const T*)p.g.data + i0 * p.g.row_stride + j;
      sum->add_rows(first, out ? p.n : p.g.row_stride, rows, n);
    }
    if (out || g_is_dz) return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    RowSource<Convert<T>>::along_row(g, buffer, i0 + i, j, n);
    if (sum) sum->add(buffer, n);
    if (out) store_row(out + i * p.n, buffer, n);
  }
}

template <class T>
void grad_pass_with(const GradPass& p, const Parallel& parallel) {
  using E = Convert<T>;
  struct Call {
    const GradPass* p;
    RowSource<E> g;
    ColumnTasks tasks;
  };
  const Call call = {&p, RowSource<E>::of(p.g, p.saved, p.act), ColumnTasks::of(p.m, p.n, parallel.threads, 4096)};
  parallel.run(call.tasks.count(), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& [pass, g, tasks] = *(const Call*)context;
    const GradPass& p = *pass;
    auto* const total = (double*)scratch((sizeof(double) + 2 * sizeof(Acc<T>)) * tasks.width);
    auto *const block = (Acc<T>*)(total + tasks.width), *const buffer = block + tasks.width;
    ColumnSum<E> sum{total, block};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = tasks.slice(task), j = tasks.column(task), n = min(tasks.width, p.n - j);
      const int64_t rows = slice_rows(p.m), i1 = min((slice + 1) * rows, p.m);
      if (p.dbias) sum.clear(n);
      for (int64_t i = slice * rows; i < i1; i += sum.kBlock)
        grad_rows<T>(p, g, buffer, p.dbias ? &sum : nullptr, i, min(sum.kBlock, i1 - i), j, n);
      if (!p.dbias) continue;
      sum.flush(n);
      sum.store((Acc<T>*)p.partials + slice * p.n + j, n);
    }
  });
  if (!p.dbias) return;
  const auto* partials = (const Acc<T>*)p.partials;
  if (p.output_mode == OutputMode::cast) return sum_slices<T>(partials, slices(p.m), p.n, (T*)p.dbias, 0, p.n);
  sum_slices<T>(partials, slices(p.m), p.n, (Acc<T>*)p.dbias, 0, p.n);
}

// y[0..n) = act(z[0..n))
template <class T, class Act>
void act_row(const T* z, T* y, int64_t n, double slope) {
  using O = Ops<Acc<T>>;
  const auto s = O::lit(slope);
  each_register<T>(n, [&](int64_t i, int64_t valid) DLK_INLINED {
    store_partial(y + i, Act::template value<O>(load_partial(z + i, 1, valid), s), valid);
  });
}

// The elements of a task of a pass. Longer tasks leave threads idle: of two, one would have two thirds of 877x40.
constexpr int64_t kPassChunk = 4096;

template <class T>
void act_pass_with(const ActPass& p, const Parallel& parallel) {
  parallel.run(ceil_div(p.count, kPassChunk), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const ActPass*)context;
    const int64_t from = begin * kPassChunk, n = min(end * kPassChunk, p.count) - from;
    with_activation(p.act.kind, [&](auto functor) {
      act_row<T, decltype(functor)>((const T*)p.z + from, (T*)p.y + from, n, p.act.slope);
    });
  });
}

template <class T, class Act, int order>
void derivative_row(const T* t, const T* s, T* out, int64_t n) {
  using O = Ops<Acc<T>>;
  each_register<T>(n, [&](int64_t i, int64_t valid) DLK_INLINED {
    const auto a = load_partial(t + i, 1, valid), b = load_partial(s + i, 1, valid);
    if constexpr (order == 1) store_partial(out + i, Act::template grad<O>(a, b, O::lit(0)), valid);
    if constexpr (order == 2) store_partial(out + i, Act::template grad2<O>(a, b), valid);
    if constexpr (order == 3) store_partial(out + i, Act::template grad3<O>(a, b), valid);
  });
}

template <class T>
using DerivativeRow = void (*)(const T* t, const T* s, T* out, int64_t n);

template <class T, class Act>
DerivativeRow<T> derivative_row_of(int order) {
  if constexpr (Act::orders >= 3)
    if (order == 3) return &derivative_row<T, Act, 3>;
  if constexpr (Act::orders >= 2) return order == 2 ? &derivative_row<T, Act, 2> : &derivative_row<T, Act, 1>;
  return nullptr;
}

template <class T>
void derivative_pass_with(const DerivativePass& p, const Parallel& parallel) {
  parallel.run(ceil_div(p.count, kPassChunk), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const DerivativePass*)context;
    const int64_t from = begin * kPassChunk, n = min(end * kPassChunk, p.count) - from;
    const auto row = with_activation(p.act, [&](auto act) { return derivative_row_of<T, decltype(act)>(p.order); });
    row((const T*)p.t + from, (const T*)p.s + from, (T*)p.out + from, n);
  });
}

// y = act(z + bias) for `count` elements, where the rows follow each other. The first one is in column j. `bias` goes on behind
// its n elements, from the first one on, for a register more.
//
// So registers are whole up to the last one. A row of its own would end in part of a register. Where y is z, the next row's load
// would overlap that masked store and wait for it: at 877x40 the pass took twice as long.
template <class T, class Act>
void bias_act_row(const T* z, const Acc<T>* bias, int64_t j, int64_t n, T* y, T* z_sum, int64_t count, double slope) {
  using O = Ops<Acc<T>>;
  const auto s = O::lit(slope);
  each_register<T>(count, [&](int64_t i, int64_t valid) DLK_INLINED {
    const auto sum = load_partial(z + i, 1, valid) + load(bias + j);
    for (j += kLanes<T>; j >= n;) j -= n;
    if (z_sum) store_partial(z_sum + i, sum, valid);
    store_partial(y + i, Act::template value<O>(sum, s), valid);
  });
}

template <class T>
void bias_act_pass_with(const BiasActPass& p, const Parallel& parallel) {
  struct Call {
    const BiasActPass* p;
    const Acc<T>* bias;
  };
  auto* const bias = (Acc<T>*)scratch((p.n + kLanes<T>)*sizeof(Acc<T>));
  copy_row<Convert<T>>(bias, (const T*)p.bias, 1, p.n);
  for (int64_t j = 0; j < kLanes<T>; ++j) bias[p.n + j] = bias[j];  // of less than a register, again and again
  const Call call = {&p, bias};
  parallel.run(ceil_div(p.m * p.n, kPassChunk), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& [pass, bias] = *(const Call*)context;
    const BiasActPass& p = *pass;
    const int64_t from = begin * kPassChunk, count = min(end * kPassChunk, p.m * p.n) - from;
    with_activation(p.act.kind, [&, bias = bias](auto functor) {
      bias_act_row<T, decltype(functor)>((const T*)p.z + from, bias, from % p.n, p.n, (T*)p.y + from,
                                         p.z_sum ? (T*)p.z_sum + from : nullptr, count, p.act.slope);
    });
  });
}

}  // namespace dlk::cpu::DLK_ISA
