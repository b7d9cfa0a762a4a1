// Elementwise passes, for calls whose product is not ours.
//
//   grad_pass  dz = g · act'(saved) and dbias = Σ dz over rows: in front of a library's product, which reads dz from
//              memory, and where no wgrad of ours adds up dbias while it packs dz
//   act_pass   y = act(z): behind a library's product
//   derivative_pass  t · a derivative of an activation: for second derivatives of a network
//   bias_act_pass  y = act(z + bias): behind one without a bias. A library adds the bias by writing it to every row of C
//                  first, which is another pass over C
//
// Rows are cut in slices of kSliceRows. One thread sums a slice, and the slices are summed in order, so that the bits
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
    const int64_t for_threads = count < 4 * threads ? min(threads, ceil_div(n, kLeast)) : 1;
    const int64_t width = round_up(ceil_div(n, max(all, for_threads)), kF32Lanes);
    return {count, width, ceil_div(n, width)};
  }
  int64_t count() const { return slices * panels; }
  int64_t slice(int64_t task) const { return task % slices; }
  int64_t column(int64_t task) const { return task / slices * width; }
};

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
      const int64_t i1 = min((slice + 1) * kSliceRows, p.m);
      if (p.dbias) sum.clear(n);
      for (int64_t i = slice * kSliceRows; i < i1; ++i) {
        T* const out = p.dz ? (T*)p.dz + i * p.n + j : nullptr;
        Acc<T>* dz = buffer;
        if constexpr (kIsSame<T, Acc<T>>)
          if (out) dz = out;  // dz is made where it belongs
        RowSource<E>::along_row(g, dz, i, j, n);
        if (p.dbias) sum.add(dz, n);
        if (out && (const void*)dz != out) store_row(out, dz, n);
      }
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

template <class T>
void act_pass_with(const ActPass& p, const Parallel& parallel) {
  constexpr int64_t kChunk = 16384;
  parallel.run(ceil_div(p.count, kChunk), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const ActPass*)context;
    const int64_t from = begin * kChunk, n = min(end * kChunk, p.count) - from;
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
  constexpr int64_t kChunk = 4096;
  parallel.run(ceil_div(p.count, kChunk), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const DerivativePass*)context;
    const int64_t from = begin * kChunk, n = min(end * kChunk, p.count) - from;
    const auto row = with_activation(p.act, [&](auto act) { return derivative_row_of<T, decltype(act)>(p.order); });
    row((const T*)p.t + from, (const T*)p.s + from, (T*)p.out + from, n);
  });
}

// y = act(z + bias), one row
template <class T, class Act>
void bias_act_row(const T* z, const T* bias, T* y, T* z_sum, int64_t n, double slope) {
  using O = Ops<Acc<T>>;
  const auto s = O::lit(slope);
  each_register<T>(n, [&](int64_t i, int64_t valid) DLK_INLINED {
    const auto sum = load_partial(z + i, 1, valid) + load_partial(bias + i, 1, valid);
    if (z_sum) store_partial(z_sum + i, sum, valid);
    store_partial(y + i, Act::template value<O>(sum, s), valid);
  });
}

template <class T>
void bias_act_pass_with(const BiasActPass& p, const Parallel& parallel) {
  constexpr int64_t kChunk = 16384;  // elements
  struct Call {
    const BiasActPass* p;
    int64_t rows;  // of a task
  };
  const Call call = {&p, max(1, kChunk / p.n)};
  parallel.run(ceil_div(p.m, call.rows), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& [pass, rows] = *(const Call*)context;
    const BiasActPass& p = *pass;
    const int64_t last = min(end * rows, p.m);
    with_activation(p.act.kind, [&, from = begin * rows](auto functor) {
      for (int64_t i = from; i < last; ++i) {
        const int64_t at = i * p.n;
        bias_act_row<T, decltype(functor)>((const T*)p.z + at, (const T*)p.bias, (T*)p.y + at,
                                           p.z_sum ? (T*)p.z_sum + at : nullptr, p.n, p.act.slope);
      }
    });
  });
}

}  // namespace dlk::cpu::DLK_ISA
