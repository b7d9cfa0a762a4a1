// Elementwise passes, for calls whose product is not ours.
//
//   grad_pass  dz = g · act'(saved) and dbias = Σ dz over rows: in front of a library's product, which reads dz from
//              memory, and where no wgrad of ours adds up dbias while it packs dz
//   act_pass   y = act(z): behind a library's product
//
// Rows are cut in slices of kSliceRows. One thread sums a slice, and the slices are summed in order, so that the bits
// are the same on any number of threads.
namespace dlk::cpu::DLK_ISA {

template <class T>
void grad_pass_with(const GradPass& p, const Parallel& parallel) {
  using E = Convert<T>;
  struct Call {
    const GradPass* p;
    RowSource<E> g;
  };
  const Call call = {&p, RowSource<E>::of(p.g, p.saved, p.act)};
  parallel.run(slices(p.m), &call, [](const void* context, int64_t begin, int64_t end) {
    const auto& call = *(const Call*)context;
    const GradPass& p = *call.p;
    constexpr int64_t kBlock = 512;
    Acc<T> dz[kBlock];
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t i1 = min((slice + 1) * kSliceRows, p.m);
      for (int64_t j = 0; j < p.n; j += kBlock) {
        const int64_t n = min(kBlock, p.n - j);
        double total[kBlock];
        Acc<T> block[kBlock];
        ColumnSum<E> sum{total, block};
        sum.clear(n);
        for (int64_t i = slice * kSliceRows; i < i1; ++i) {
          RowSource<E>::along_row(call.g, dz, i, j, n);
          if (p.dbias) sum.add(dz, n);
          if (p.dz)
            for (int64_t c = 0; c < n; c += kLanes<T>)
              store_partial((T*)p.dz + i * p.n + j + c, load_partial(dz + c, 1, min(kLanes<T>, n - c)), n - c);
        }
        if (!p.dbias) continue;
        sum.flush(n);
        sum.store((Acc<T>*)p.partials + slice * p.n + j, n);
      }
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
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t valid = min(kLanes<T>, n - i);
    store_partial(y + i, Act::template value<O>(load_partial(z + i, 1, valid), s), valid);
  }
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

}  // namespace dlk::cpu::DLK_ISA
