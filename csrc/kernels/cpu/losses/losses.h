// The loss kernels. loss_params.h has the formulas.
#include "kernels/loss_terms.h"

namespace dlk::cpu::DLK_ISA {

// ---- registers ------------------------------------------------------------------------------------------------------

// Load min(n, lanes) elements at a stride; with stride 0 load the same element in every lane.
template <class T>
DLK_INLINE Vec<Acc<T>> load_or_splat(const T* p, int64_t stride, int64_t n) {
  if (stride != 0) return load_partial(p, stride, n);
  T same[kLanes<T>];
  for (T& lane : same) lane = *p;
  return load(same);
}
// Store the first min(n, lanes) lanes at a stride.
template <class T>
DLK_INLINE void store_at_stride(T* p, int64_t stride, Vec<Acc<T>> v, int64_t n) {
  if (stride == 1) return store_partial(p, v, n);
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t i = 0; i < n && i < kLanes<T>; ++i) p[i * stride] = lanes[i];
}
// Return v with `value` in the lanes from n on.
template <class V, class S>
DLK_INLINE V fill_tail(V v, int64_t n, S value) {
  constexpr int64_t lanes = sizeof(V) / sizeof(S);
  for (int64_t i = n; i < lanes; ++i) v[i] = value;
  return v;
}
// Return the sum, or the maximum, of all lanes in every lane. A NaN is never the maximum.
template <class V>
DLK_INLINE V sum_lanes(V v) {
  for (size_t lanes = sizeof(V) / sizeof(v[0]); lanes > 1; lanes /= 2) v = interleave<0>(v, v) + interleave<1>(v, v);
  return v;
}
template <class V>
DLK_INLINE V max_lanes(V v) {
  for (size_t lanes = sizeof(V) / sizeof(v[0]); lanes > 1; lanes /= 2) {
    const V a = interleave<0>(v, v), b = interleave<1>(v, v);
    v = a > b ? a : b;
  }
  return v;
}

// The registers that are summed per lane before they are added to the total. Short sums err less.
constexpr int64_t kSumBlock = 32;

// ---- elementwise losses ---------------------------------------------------------------------------------------------

template <class T, class Loss>
void elementwise_slice(const ElementwiseLoss& p, int64_t slice) {
  using A = Acc<T>;
  using O = Ops<A>;
  using V = Vec<A>;
  const Loss loss(p);
  const V divisor = O::lit(p.divisor * Loss::grad_divisor);
  ExactSum total;
  V block{};
  int64_t in_block = 0;
  auto negative = V{} < V{};
  const int64_t stop = min((slice + 1) * kLossSlice, p.rows * p.cols);
  for (int64_t at = slice * kLossSlice; at < stop;) {
    const int64_t row = at / p.cols, col = at % p.cols, n = min(p.cols - col, stop - at);
    auto elements = [&](const View& v) { return (const T*)v.data + row * v.row_stride + col * v.col_stride; };
    const T *x = elements(p.input), *t = elements(p.target), *var = Loss::has_var ? elements(p.var) : nullptr;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int64_t valid = n - i;
      const V xv = load_or_splat(x + i * p.input.col_stride, p.input.col_stride, valid);
      const V tv = load_or_splat(t + i * p.target.col_stride, p.target.col_stride, valid);
      V vv{};
      if constexpr (Loss::has_var) {
        vv = load_or_splat(var + i * p.var.col_stride, p.var.col_stride, valid);
        negative |= vv < V{};
      }
      const Terms<V> terms = loss(xv, tv, vv);
      block += valid < kLanes<T> ? fill_tail(terms.loss, valid, A(0)) : terms.loss;
      if (p.loss) store_partial((T*)p.loss + at + i, terms.loss, valid);
      if (p.grad_input) store_partial((A*)p.grad_input + at + i, terms.grad_input / divisor, valid);
      if (p.grad_var) store_partial((A*)p.grad_var + at + i, terms.grad_var / divisor, valid);
      if (++in_block == kSumBlock) {
        total.add(sum_lanes(block)[0]);
        block = V{};
        in_block = 0;
      }
    }
    at += n;
  }
  total.add(sum_lanes(block)[0]);
  p.sums[slice] = total.value();
  if constexpr (Loss::has_var) {
    p.negative[slice] = 0;
    for (int i = 0; i < kLanes<T>; ++i) p.negative[slice] |= negative[i] != 0;
  }
}

template <class T, class Loss>
void elementwise_with(const ElementwiseLoss& p, const Parallel& parallel) {
  parallel.run(loss_slices(p), &p, [](const void* context, int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice)
      elementwise_slice<T, Loss>(*(const ElementwiseLoss*)context, slice);
  });
}

// ---- cross entropy --------------------------------------------------------------------------------------------------

// The two meanings of the lanes of a register. In scratch one register follows the other in both.
//
//   AcrossClasses  kLanes classes of one row: for long contiguous rows
//   AcrossRows     one class of kLanes rows: for few classes, or classes that lie apart ([N, C, d1, ...])
template <class T>
struct AcrossClasses {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int64_t kRows = 1;
  static constexpr int64_t kClasses = kLanes<T>;
  static int64_t stride(const ClassStrides& s) { return s.cls; }
  static int64_t lanes(int64_t classes, int64_t) { return min(kClasses, classes); }
  static int64_t at(int64_t c, int64_t) { return c; }
  DLK_INLINE V classes_only(V v, int64_t classes, A other) {
    return classes < kClasses ? fill_tail(v, classes, other) : v;
  }
  DLK_INLINE V max(V v) { return max_lanes(v); }
  DLK_INLINE V sum(V v) { return sum_lanes(v); }
  DLK_INLINE V of_rows(const A* value) { return V{} + *value; }
  DLK_INLINE V of_classes(const A* value, int64_t classes) { return load_partial(value, 1, classes); }
};

template <class T>
struct AcrossRows {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int64_t kRows = kLanes<T>;
  static constexpr int64_t kClasses = 1;
  static int64_t stride(const ClassStrides& s) { return s.inner; }
  static int64_t lanes(int64_t, int64_t rows) { return rows; }
  static int64_t at(int64_t c, int64_t row) { return c * kRows + row; }
  DLK_INLINE V classes_only(V v, int64_t, A) { return v; }
  DLK_INLINE V max(V v) { return v; }
  DLK_INLINE V sum(V v) { return v; }
  DLK_INLINE V of_rows(const A* value) { return load(value); }
  DLK_INLINE V of_classes(const A* value, int64_t) { return V{} + *value; }
};

// Compute `rows` (at most L::kRows) rows from inner0 on, and add their losses to total.
template <class T, class L>
void cross_entropy_rows(const CrossEntropy& p, int64_t outer, int64_t inner0, int64_t rows, ExactSum& total) {
  using A = Acc<T>;
  using O = Ops<A>;
  using V = Vec<A>;
  constexpr int64_t kVL = kLanes<T>;
  const int64_t registers = ceil_div(p.classes, L::kClasses);
  auto offset = [&](const ClassStrides& s) { return outer * s.outer + inner0 * s.inner; };
  const T* x = (const T*)p.x + offset(p.x_strides);
  const bool soft = !p.target;
  const T* t = soft ? (const T*)p.soft + offset(p.soft_strides) : nullptr;
  const int64_t first_row = outer * p.inner + inner0;
  A* const values = (A*)scratch(registers * kVL * sizeof(A));  // x - max, or its exponential
  const A weight_one = 1;

  // Call f(i, classes from this register on, valid lanes) for every register. For whole registers of classes the last two
  // are constants.
  auto each = [&](auto&& f) {
    const int64_t whole = p.classes / L::kClasses, rest = p.classes % L::kClasses;
    for (int64_t i = 0; i < whole; ++i) f(i, L::kClasses, L::lanes(L::kClasses, rows));
    if constexpr (L::kClasses > 1)
      if (rest) f(whole, rest, L::lanes(rest, rows));
  };
  // Return the sum of f(i, classes, lanes) over a row, for every row.
  auto sum = [&](auto&& f) {
    ExactLanes<V> total;
    each([&](int64_t i, int64_t classes, int64_t lanes) { total.add(f(i, classes, lanes)); });
    return ExactLanes<V>{L::sum(total.sum), L::sum(total.lost)}.value();
  };
  auto class_weight = [&](int64_t i, int64_t classes) {
    return p.weight ? L::of_classes((const A*)p.weight + i * L::kClasses, classes) : V{} + weight_one;
  };

  V highest = O::lit(-__builtin_inf());
  each([&](int64_t i, int64_t classes, int64_t lanes) {
    const V loaded = load_partial(x + i * L::kClasses * p.x_strides.cls, L::stride(p.x_strides), lanes);
    const V v = L::classes_only(loaded, classes, A(-__builtin_inf()));
    store(values + i * kVL, v);
    highest = v > highest ? v : highest;
  });
  highest = L::max(highest);

  // Leave out the term of q at the target index. The rest of q is dense with class probabilities or smoothing,
  // otherwise 0.
  const bool dense = soft || p.smoothing > 0;
  auto dense_q = [&](double scale) {
    const V uniform = O::lit(p.smoothing / p.classes * scale), target_share = O::lit((1 - p.smoothing) * scale);
    return [&, uniform, target_share](int64_t i, int64_t classes, int64_t lanes) {
      V q = uniform;
      if (soft)
        q += target_share * load_partial(t + i * L::kClasses * p.soft_strides.cls, L::stride(p.soft_strides), lanes);
      return class_weight(i, classes) * q;
    };
  };

  const bool stores_exp = p.grad && !dense;
  const V exp_sum = sum([&](int64_t i, int64_t, int64_t) {
    const V d = load(values + i * kVL) - highest, e = O::exp(d);
    store(values + i * kVL, stores_exp ? e : d);
    return e;
  });
  const V log_sum = O::log(exp_sum);

  // Two sums over q without the term at the target index: Σ q·(x - max), in units of `uniform` for class indices, and Σ
  // q.
  V dot{}, q_sum{};
  if (soft) {
    const auto q = dense_q(1);
    dot = sum([&](int64_t i, int64_t classes, int64_t lanes) {
      return L::classes_only(q(i, classes, lanes) * load(values + i * kVL), classes, A(0));
    });
    q_sum = sum([&](int64_t i, int64_t classes, int64_t lanes) {
      return L::classes_only(q(i, classes, lanes), classes, A(0));
    });
  } else if (dense) {
    dot = sum([&](int64_t i, int64_t classes, int64_t) {
      return L::classes_only(class_weight(i, classes) * load(values + i * kVL), classes, A(0));
    });
  }

  // The factors of a row are computed in f64, because a rounding error here would be in every term.
  A factor[kVL] = {}, is_counted[kVL] = {}, target_grad[kVL] = {}, row_grad[kVL] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const double log_s = log_sum[r];
    double loss = 0, all_q = 0;
    if (soft) {
      all_q = q_sum[r];
      loss = all_q * log_s - dot[r];
      is_counted[r] = 1;
    } else if (const int64_t target = p.target[first_row + r]; target != p.ignore_index) {
      const double x_target = load_partial(x + target * p.x_strides.cls + r * p.x_strides.inner, 1, 1)[0];
      const double weight = p.weight ? ((const A*)p.weight)[target] : A(1), uniform_share = p.smoothing / p.classes;
      const double target_q = weight * (1 - p.smoothing);
      loss = target_q * (log_s - (x_target - highest[r]));
      if (dense) loss += uniform_share * (p.weight_sum * log_s - dot[r]);
      all_q = target_q + uniform_share * p.weight_sum;
      target_grad[r] = A((target_q + uniform_share * weight) * p.scale);
      is_counted[r] = 1;
    }
    factor[r] = A(all_q * (is_counted[r] ? p.scale : 0) / exp_sum[r]);
    total.add(loss);
    if (p.loss) ((A*)p.loss)[first_row + r] = A(loss);
    if (p.row_grad) row_grad[r] = ((const A*)p.row_grad)[first_row + r];
  }

  // d/dx = (softmax·Σq - q)·scale. In an ignored row it is 0, except that NaN in x stays NaN, as in torch.
  if (p.grad_soft) {
    A* grad = (A*)p.grad_soft + offset(p.grad_strides);
    const V target_scale = O::lit(-(1 - p.smoothing) * p.scale);
    each([&](int64_t i, int64_t classes, int64_t lanes) {
      const V g = class_weight(i, classes) * target_scale * (load(values + i * kVL) - log_sum);
      store_at_stride(grad + i * L::kClasses * p.grad_strides.cls, L::stride(p.grad_strides), g, lanes);
    });
  }
  if (!p.grad) return;
  const V row_factor = L::of_rows(factor), row_is_counted = L::of_rows(is_counted), row_scale = L::of_rows(row_grad);
  const auto scaled_q = dense_q(p.scale);
  auto store_grad = [&](auto* grad) {
    grad += offset(p.grad_strides);
    each([&](int64_t i, int64_t classes, int64_t lanes) {
      V e = load(values + i * kVL), g;
      if (dense) {
        e = O::exp(e);
        store(values + i * kVL, e);
        g = e * row_factor - (row_is_counted > V{} ? scaled_q(i, classes, lanes) : V{});
      } else {
        g = e * row_factor;
      }
      if (p.row_grad) g = g * row_scale;
      store_at_stride(grad + i * L::kClasses * p.grad_strides.cls, L::stride(p.grad_strides), g, lanes);
    });
    for (int64_t r = 0; !soft && r < rows; ++r) {
      const int64_t target = p.target[first_row + r];
      if (target == p.ignore_index) continue;
      const A g = values[L::at(target, r)] * factor[r] - target_grad[r];
      store_partial(grad + target * p.grad_strides.cls + r * p.grad_strides.inner,
                    V{} + (p.row_grad ? g * row_grad[r] : g), 1);
    }
  };
  if constexpr (kIsSame<A, float>) {
    if (p.grad_dtype == DType::bf16) return store_grad((Bf16*)p.grad);
    if (p.grad_dtype == DType::f16) return store_grad((F16*)p.grad);
  }
  store_grad((A*)p.grad);
}

template <class T, class L>
void cross_entropy_slices(const CrossEntropy& p, int64_t begin, int64_t end) {
  const int64_t slice_rows = row_slice(p.classes), per_outer = ceil_div(p.inner, slice_rows);
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t outer = slice / per_outer, from = slice % per_outer * slice_rows;
    const int64_t to = min(from + slice_rows, p.inner);
    ExactSum total;
    for (int64_t s = from; s < to; s += L::kRows) cross_entropy_rows<T, L>(p, outer, s, min(L::kRows, to - s), total);
    p.sums[slice] = total.value();
  }
}

template <class T>
void cross_entropy_with(const CrossEntropy& p, const Parallel& parallel) {
  parallel.run(loss_slices(p), &p, [](const void* context, int64_t begin, int64_t end) {
    const auto& p = *(const CrossEntropy*)context;
    const bool long_rows = p.x_strides.cls == 1 && p.classes >= 2 * kLanes<T>;
    if (long_rows) return cross_entropy_slices<T, AcrossClasses<T>>(p, begin, end);
    cross_entropy_slices<T, AcrossRows<T>>(p, begin, end);
  });
}

template <class T>
constexpr Losses losses() {
  return {&elementwise_with<T, SquaredError<Ops<Acc<T>>>>, &elementwise_with<T, GaussianNLL<Ops<Acc<T>>>>,
          &cross_entropy_with<T>};
}

}  // namespace dlk::cpu::DLK_ISA
