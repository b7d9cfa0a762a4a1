// Elementwise passes of a gated layer, y = act(gate) · up, around products that are not fused with it.
//
//   glu_pass       y from both preactivations
//   glu_grad_pass  the gradients of both preactivations and their column sums, from one read of g, gate and up
//
// Rows are cut as in grad_pass (passes.h), so that the bits are the same on any number of threads.
namespace dlk::cpu::DLK_ISA {

// y[0..n) of preactivations that lie `stride` apart.
template <class T, class Act>
void glu_row(const T* gate, const T* up, int64_t stride, T* y, int64_t n, double slope) {
  using O = Ops<Acc<T>>;
  const auto s = O::lit(slope);
  each_register<T>(n, [&](int64_t i, int64_t valid) DLK_INLINED {
    const auto z = load_partial(gate + i * stride, stride, valid), z_up = load_partial(up + i * stride, stride, valid);
    store_partial(y + i, Act::template value<O>(z, s) * z_up, valid);
  });
}

template <class T>
void glu_pass_with(const GluPass& p, const Parallel& parallel) {
  struct Rows {
    const GluPass* p;
    int64_t n, pitch, stride;
  };
  // Rows behind each other are one long row. So are rows of one element, which lie a stride apart.
  const bool one_row = p.pitch == p.n || p.n == 1;
  const Rows rows = {&p, one_row ? p.m * p.n : p.n, p.pitch, p.n == 1 ? p.pitch : 1};
  parallel.run(ceil_div(p.m * p.n, kPassChunk), &rows, [](const void* context, int64_t begin, int64_t end) {
    const auto& [pass, row_n, pitch, stride] = *(const Rows*)context;
    const GluPass& p = *pass;
    const int64_t last = min(end * kPassChunk, p.m * p.n);
    with_activation(p.act.kind, [&](auto functor) {
      for (int64_t at = begin * kPassChunk; at < last;) {
        const int64_t row = at / row_n, col = at - row * row_n, n = min(row_n - col, last - at);
        const int64_t from = row * pitch + col * stride;
        glu_row<T, decltype(functor)>((const T*)p.gate + from, (const T*)p.up + from, stride, (T*)p.y + at, n,
                                      p.act.slope);
        at += n;
      }
    });
  });
}

// dst[c] = src[row, col + c] for n elements; zeros where there is no memory, for an operand that no wanted result reads.
template <class T>
DLK_INLINE Vec<Acc<T>> load_at(const View& v, int64_t row, int64_t col, int64_t n) {
  if (!v.data) return Vec<Acc<T>>{};
  return load_partial((const T*)v.data + row * v.row_stride + col * v.col_stride, v.col_stride, n);
}

// One row of both dz, columns j to j + n.
template <class T, class Act>
void glu_grad_row(const GluGradPass& p, Acc<T>* dz_gate, Acc<T>* dz_up, int64_t row, int64_t j, int64_t n) {
  using O = Ops<Acc<T>>;
  const auto slope = O::lit(p.act.slope);
  each_register<T>(n, [&](int64_t i, int64_t valid) DLK_INLINED {
    const auto g = load_at<T>(p.g, row, j + i, valid), z = load_at<T>(p.gate, row, j + i, valid);
    const auto z_up = load_at<T>(p.up, row, j + i, valid), value = Act::template value<O>(z, slope);
    store_partial(dz_gate + i, Act::template grad<O>(g * z_up, Act::saves_output ? value : z, slope), valid);
    store_partial(dz_up + i, g * value, valid);
  });
}

// Store one row of dz, and add it to its column sums.
template <class T>
DLK_INLINE void keep_row(const Acc<T>* dz, void* to, int64_t at, ColumnSum<Convert<T>>* sum, int64_t n) {
  if (sum) sum->add(dz, n);
  if (to) store_row((T*)to + at, dz, n);
}

template <class T>
void glu_grad_pass_with(const GluGradPass& p, const Parallel& parallel) {
  using Row = void (*)(const GluGradPass&, Acc<T>*, Acc<T>*, int64_t, int64_t, int64_t);
  struct Call {
    const GluGradPass* p;
    Row row;
    ColumnTasks tasks;
  };
  const Call call = {
      &p, with_activation(p.act.kind, [](auto functor) -> Row { return &glu_grad_row<T, decltype(functor)>; }),
      ColumnTasks::of(p.m, p.n, parallel.threads, 2048)};
  parallel.run(call.tasks.count(), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& [pass, row, tasks] = *(const Call*)context;
    const GluGradPass& p = *pass;
    const int64_t width = tasks.width;
    auto* const totals = (double*)scratch(2 * (sizeof(double) + 2 * sizeof(Acc<T>)) * width);
    auto* const blocks = (Acc<T>*)(totals + 2 * width);
    Acc<T>*const dz_gate = blocks + 2 * width, *const dz_up = dz_gate + width;
    ColumnSum<Convert<T>> of_gate{totals, blocks}, of_up{totals + width, blocks + width};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = tasks.slice(task), j = tasks.column(task), n = min(width, p.n - j);
      const int64_t rows = slice_rows(p.m), i1 = min((slice + 1) * rows, p.m);
      if (p.dbias_gate) of_gate.clear(n);
      if (p.dbias_up) of_up.clear(n);
      for (int64_t i = slice * rows; i < i1; ++i) {
        row(p, dz_gate, dz_up, i, j, n);
        keep_row<T>(dz_gate, p.dz_gate, i * p.dz_pitch + j, p.dbias_gate ? &of_gate : nullptr, n);
        keep_row<T>(dz_up, p.dz_up, i * p.dz_pitch + j, p.dbias_up ? &of_up : nullptr, n);
      }
      auto* const sums = (Acc<T>*)p.partials + slice * p.n + j;
      if (p.dbias_gate) {
        of_gate.flush(n);
        of_gate.store(sums, n);
      }
      if (p.dbias_up) {
        of_up.flush(n);
        of_up.store(sums + (p.dbias_gate ? slices(p.m) * p.n : 0), n);
      }
    }
  });
  const auto* partials = (const Acc<T>*)p.partials;
  if (p.dbias_gate) sum_slices<T>(partials, slices(p.m), p.n, (T*)p.dbias_gate, 0, p.n);
  if (!p.dbias_up) return;
  if (p.dbias_gate) partials += slices(p.m) * p.n;
  sum_slices<T>(partials, slices(p.m), p.n, (T*)p.dbias_up, 0, p.n);
}

}  // namespace dlk::cpu::DLK_ISA
