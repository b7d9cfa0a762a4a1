// The losses and their gradients. Inputs are read once where a row fits in registers or shared memory.
//
// Sums are made in f64: every thread sums its terms, a block adds up its threads, and one block adds up the blocks. The
// shape alone determines which terms a block has.
#pragma once

#include "kernels/loss_terms.h"
#include "kernels/cuda/elementwise/row_packs.cuh"
#include "kernels/cuda/losses/team.cuh"

namespace dlk::cuda {

constexpr int kLossThreads = 256;
using LossBlock = Team<kLossThreads>;

// The scratch of a call: kLossBlocks sums, then kCountBlocks sums of the targets' weights and kCountBlocks of all
// weights.
constexpr int kLossBlocks = kLossCountsAt;  // at most; each SM of the largest devices can hold 8 blocks of 256 threads
constexpr int kCountBlocks = kLossCounts;   // at most; each thread of a block reads the sum of one
static_assert(kCountBlocks <= kLossThreads && kLossScratch >= kLossBlocks + 2 * kCountBlocks);
DLK_HD double* counts_of(const CrossEntropy& p) { return p.sums + kLossBlocks; }
DLK_HD int count_blocks(const CrossEntropy& p) {
  const int64_t rows = p.counted ? p.counted : p.outer * p.inner, most = rows > p.classes ? rows : p.classes;
  const int64_t blocks = ceil_div(most, kLossThreads);
  return static_cast<int>(blocks < kCountBlocks ? blocks : kCountBlocks);
}

template <class O>
DLK_DEVICE typename O::T not_a_number() {
  return O::lit(__builtin_nan(""));
}

// Return a / b for numbers >= 0. 32-bit division is several times faster than 64-bit.
DLK_DEVICE int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// The sum of the many terms of a thread: in f64, and for terms in f64 together with what each addition rounds away.
template <class A>
struct ThreadSum {
  double sum = 0;
  DLK_DEVICE void add(A term) { sum += term; }
  DLK_DEVICE void scale(A factor) { sum *= factor; }
  DLK_DEVICE double value() const { return sum; }
};
template <>
struct ThreadSum<double> : ExactSum {
  DLK_DEVICE void scale(double factor) { sum *= factor, lost *= factor; }
};

// ---- elementwise losses ---------------------------------------------------------------------------------------------

// A block takes `length` elements, which are whole steps of all its threads. kWidth > 1: the elements of a thread at
// one step are in one row.
template <class T, class Loss, int kWidth>
__global__ void __launch_bounds__(kLossThreads) elementwise_loss_kernel(const ElementwiseLoss p, const int64_t length) {
  using A = Acc<T>;
  using O = Ops<A>;
  const Loss loss(p);
  const A divisor = O::lit(p.divisor * Loss::grad_divisor);
  const bool x_in_packs = allows_packs<T, kWidth>(p.input), t_in_packs = allows_packs<T, kWidth>(p.target);
  const bool var_in_packs = allows_packs<T, kWidth>(p.var), loss_in_packs = allows_packs<T, kWidth>({p.loss, 0, 1});
  const bool dx_in_packs = allows_packs<A, kWidth>({p.grad_input, 0, 1});
  const bool dvar_in_packs = allows_packs<A, kWidth>({p.grad_var, 0, 1});
  const int64_t count = p.rows * p.cols, stop = min(count, (blockIdx.x + int64_t{1}) * length);
  ThreadSum<A> thread_total;
  for (int64_t at = blockIdx.x * length + threadIdx.x * kWidth; at < stop; at += kLossThreads * kWidth) {
    const int64_t row = p.rows == 1 ? 0 : quotient(at, p.cols), col = at - row * p.cols, left = count - at;
    A x[kWidth], t[kWidth], var[kWidth] = {}, value[kWidth], dx[kWidth], dvar[kWidth], sum = 0;
    load_packs<T>(p.input, row, col, x_in_packs, left, x);
    load_packs<T>(p.target, row, col, t_in_packs, left, t);
    if constexpr (Loss::has_var) load_packs<T>(p.var, row, col, var_in_packs, left, var);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const Terms<A> terms = loss(x[e], t[e], var[e] < A(0) ? not_a_number<O>() : var[e]);
      value[e] = terms.loss;
      dx[e] = terms.grad_input / divisor, dvar[e] = terms.grad_var / divisor;
      if (e < left) sum += value[e];
    }
    thread_total.add(sum);
    if (p.loss) store_packs<T>(p.loss, at, loss_in_packs, left, value);
    if (p.grad_input) store_packs<A>(p.grad_input, at, dx_in_packs, left, dx);
    if (p.grad_var) store_packs<A>(p.grad_var, at, dvar_in_packs, left, dvar);
  }
  const double total = LossBlock::sum(thread_total.value());
  if (threadIdx.x == 0) p.sums[blockIdx.x] = total;
}

// ---- cross entropy: the weights of rows ----------------------------------------------------------------------

template <class A>
DLK_DEVICE A class_weight(const CrossEntropy& p, int64_t c) {
  return p.weight ? static_cast<const A*>(p.weight)[c] : A(1);
}

// Sum the weights of the targets, and the weights of all classes, to one part per block. A target that is no class
// makes NaN.
template <class A>
__global__ void __launch_bounds__(kLossThreads) count_kernel(const CrossEntropy p) {
  const int64_t first = int64_t{blockIdx.x} * kLossThreads + threadIdx.x, step = int64_t{gridDim.x} * kLossThreads;
  ThreadSum<double> counted, all;
  for (int64_t row = first; row < p.outer * p.inner; row += step) {
    const int64_t target = p.target[row];
    if (target == p.ignore_index) continue;
    counted.add(target >= 0 && target < p.classes ? class_weight<A>(p, target) : __builtin_nan(""));
  }
  for (int64_t c = first; c < p.classes; c += step) all.add(class_weight<A>(p, c));
  const double block_counted = LossBlock::sum(counted.value()), block_all = LossBlock::sum(all.value());
  if (threadIdx.x == 0) {
    counts_of(p)[blockIdx.x] = block_counted;
    counts_of(p)[kCountBlocks + blockIdx.x] = block_all;
  }
}

// Return the sum of the blocks' parts; all threads of a block call it.
DLK_DEVICE double total_count(const double* counts, int blocks) {
  return LossBlock::sum(static_cast<int>(threadIdx.x) < blocks ? counts[threadIdx.x] : 0.0);
}

// ---- cross entropy: rows --------------------------------------------------------------------------------------------

// Values that all rows of a call share.
template <class A>
struct RowTerms {
  A scale;                             // of the gradients
  double uniform_share, target_share;  // in q: of every class by smoothing, and of the target after smoothing
  double weight_sum;
  bool dense;  // q is not zero beside the target
};

// The logits of one row that belong to one thread of its team: in registers, or with kPer == 0 in shared or global
// memory. There a thread has runs of kWidth neighbours, which are one 16-byte access where the row allows it.
template <class T, int kTeam, int kPer>
struct Logits {
  using A = Acc<T>;
  static constexpr int kWidth = kPer > 0 || kTeam == 1 ? 1 : kPack<T>;
  static constexpr int64_t kStep = int64_t{kTeam} * kWidth;  // from one run of a thread to its next
  using Run = Pack<T, kWidth>;
  View row;
  int64_t classes;
  int rank;
  T* cache;  // of the whole row in whole runs, or nullptr
  bool in_packs;
  A held[kPer ? kPer : 1];

  DLK_DEVICE Logits(const View& logits, int64_t classes_, int rank_, T* cache_)
      : row(logits), classes(classes_), rank(rank_), cache(cache_), in_packs(allows_packs<T, kWidth>(logits)) {}

  DLK_DEVICE T at(int64_t c) const { return static_cast<const T*>(row.data)[c * row.col_stride]; }
  DLK_DEVICE int valid(int64_t c) const { return static_cast<int>(min(int64_t{kWidth}, classes - c)); }
  DLK_DEVICE Run from_memory(int64_t c) const { return load_run<T, kWidth>(row, 0, c, in_packs, classes - c); }

  // Runs that were loaded at once are used one after the other, by one copy of the code that uses them if they are wide:
  // more would need more registers than there are.
  static constexpr int copies(int batch) { return kWidth == 1 ? batch : 1; }
  template <int kBatch>
  DLK_DEVICE static void drop_first(Run (&runs)[kBatch]) {  // registers cannot be indexed at run time
#pragma unroll
    for (int next = 1; next < kBatch; ++next) runs[next - 1] = runs[next];
  }

  // Call f(class, valid, logits) for every run of this thread, from this class on; `valid` of the logits exist.
  template <class F>
  DLK_DEVICE void each_run(F&& f) const {
    if constexpr (kPer > 0) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const A v[1] = {held[i]};
        if (rank + i * kTeam < classes) f(int64_t{rank + i * kTeam}, 1, v);
      }
    } else {
      constexpr int kBatch = sizeof(T) == 8 ? 1 : kWidth == 1 ? 4 : 2;  // runs that are loaded at once
      for (int64_t first = int64_t{rank} * kWidth; first < classes; first += kBatch * kStep) {
        Run run[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t c = first + b * kStep;
          if (c < classes) run[b] = cache ? *reinterpret_cast<const Run*>(cache + c) : from_memory(c);
        }
        constexpr int kCopies = copies(kBatch);
#pragma unroll kCopies
        for (int b = 0; b < kBatch && first + b * kStep < classes; ++b) {
          const int64_t c = first + b * kStep;
          A v[kWidth];
          widen(run[0], v);
          f(c, valid(c), v);
          drop_first(run);
        }
      }
    }
  }

  // Compute the largest logit of the row, and Σ exp(logit - largest), which is 1 for a row without classes, so that its
  // logarithm is 0.
  DLK_DEVICE void softmax(A* largest, A* exp_sum) {
    using O = Ops<A>;
    const A inf = O::lit(__builtin_inf());
    A max = -inf, sum = 0;
    if constexpr (kPer > 0) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int64_t c = rank + i * kTeam;
        held[i] = c < classes ? widen(at(c)) : -inf;
        max = held[i] > max ? held[i] : max;
      }
      max = Team<kTeam>::max(max);
      each_run([&](int64_t, int, const A(&v)[1]) { sum += O::exp(v[0] - max); });
    } else {  // online softmax: a larger logit scales down the sum so far (Milakov & Gimelshein, 2018)
      constexpr int kBatch = sizeof(T) == 8 ? 2 / kWidth : kWidth == 1 ? 8 : 2;  // runs that are loaded at once
      ThreadSum<A> thread_sum;
      for (int64_t first = int64_t{rank} * kWidth; first < classes; first += kBatch * kStep) {
        Run run[kBatch];
        A batch_max = max;
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          if (first + b * kStep < classes) run[b] = from_memory(first + b * kStep);
        // Beyond the end a logit counts as -inf.
        auto logit = [&](int b, T loaded, int e) { return first + b * kStep + e < classes ? widen(loaded) : -inf; };
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t c = first + b * kStep;
          if (cache && c < classes) *reinterpret_cast<Run*>(cache + c) = run[b];
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            const A v = logit(b, run[b].at[e], e);
            batch_max = v > batch_max ? v : batch_max;
          }
        }
        if (batch_max > max) thread_sum.scale(O::exp(max - batch_max));
        max = batch_max;
        A partial = 0;
        constexpr int kCopies = copies(kBatch);
#pragma unroll kCopies
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            const A v = logit(b, run[0].at[e], e);
            partial += v == -inf ? A(0) : O::exp(v - max);
          }
          if (kWidth > 1 || b == kBatch - 1) thread_sum.add(partial), partial = 0;
          drop_first(run);
        }
      }
      const A thread_max = max;
      max = Team<kTeam>::max(max);
      sum = static_cast<A>(thread_sum.value());
      if (thread_max != max) sum *= O::exp(thread_max - max);
    }
    sum = Team<kTeam>::sum(sum);
    *largest = max, *exp_sum = classes > 0 ? sum : A(1);
  }
};

// Store the first `valid` values to elements c and following of a row.
template <class Out, class A, int kWidth>
DLK_DEVICE void store_run(void* data, int64_t stride, int64_t c, int valid, const A (&v)[kWidth]) {
  if (kWidth > 1 && stride == 1) return store_packs<Out>(data, c, allows_packs<Out, kWidth>({data, 0, 1}), valid, v);
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
    if (e < valid) narrow(v[e], static_cast<Out*>(data) + (c + e) * stride);
}

// Return the loss of `row` in the first thread of its team, and 0 in the others. Outputs are stored only if `exists`.
template <class T, int kTeam, int kPer>
DLK_DEVICE double cross_entropy_row(const CrossEntropy& p, const RowTerms<Acc<T>>& terms, int64_t row, bool exists,
                                    T* cache) {
  using A = Acc<T>;
  using O = Ops<A>;
  const int64_t outer = p.outer == 1 ? 0 : quotient(row, p.inner), inner = row - outer * p.inner;
  auto offset = [&](const ClassStrides& s) { return outer * s.outer + inner * s.inner; };
  const int rank = threadIdx.x % kTeam;
  const bool soft = !p.target;
  const int64_t index = soft ? -1 : p.target[row];
  const bool legal = index >= 0 && index < p.classes;
  using Row = Logits<T, kTeam, kPer>;
  Row logits({static_cast<const T*>(p.x) + offset(p.x_strides), 0, p.x_strides.cls}, p.classes, rank, cache);
  // The logit of the target is read here, because in place another thread may overwrite it after the next reduction of
  // the team.
  const A target_logit = rank == 0 && legal ? widen(logits.at(index)) : A(0);
  A largest, exp_sum;
  logits.softmax(&largest, &exp_sum);
  const A log_sum = O::log(exp_sum);

  // Two sums over q without the term at the target index: Σ q·(x - largest), in units of `uniform_share` for class
  // indices, and Σ q.
  const View soft_row = {soft ? static_cast<const T*>(p.soft) + offset(p.soft_strides) : nullptr, 0,
                         p.soft_strides.cls};
  const bool soft_in_packs = allows_packs<T, Row::kWidth>(soft_row);
  auto soft_q = [&](int64_t c, int valid, A(&q)[Row::kWidth]) {
    load_packs<T>(soft_row, 0, c, soft_in_packs, valid, q);
#pragma unroll
    for (int e = 0; e < Row::kWidth; ++e)
      if (e < valid)
        q[e] = class_weight<A>(p, c + e) * (O::lit(terms.uniform_share) + O::lit(terms.target_share) * q[e]);
  };
  double dot = 0, q_sum = 0;
  if (terms.dense) {
    ThreadSum<A> dots, qs;
    logits.each_run([&](int64_t c, int valid, const A(&v)[Row::kWidth]) {
      A q[Row::kWidth];
      if (soft) soft_q(c, valid, q);
#pragma unroll
      for (int e = 0; e < Row::kWidth; ++e) {
        if (e >= valid) continue;
        if (!soft) q[e] = class_weight<A>(p, c + e);
        dots.add(q[e] * (v[e] - largest));
        qs.add(q[e]);
      }
    });
    dot = Team<kTeam>::sum(dots.value());
    if (soft) q_sum = Team<kTeam>::sum(qs.value());
  }

  const A scale = p.row_grad ? terms.scale * static_cast<const A*>(p.row_grad)[row] : terms.scale;
  double loss = 0, all_q = 0;
  A target_grad = 0;
  int64_t target = -1;
  bool is_counted = soft;
  if (soft) {
    all_q = q_sum;
    loss = all_q * log_sum - dot;
  } else if (index != p.ignore_index) {
    target = index;
    is_counted = true;
    const double weight = legal ? class_weight<A>(p, target) : __builtin_nan("");
    const double target_q = weight * terms.target_share;
    if (rank == 0 && legal) loss = target_q * (double{log_sum} - (double{target_logit} - largest));
    if (!legal) loss = weight;
    if (terms.dense) loss += terms.uniform_share * (terms.weight_sum * log_sum - dot);
    all_q = target_q + terms.uniform_share * terms.weight_sum;
    target_grad = static_cast<A>(target_q + terms.uniform_share * weight) * scale;
  }
  // d/dx = (softmax·Σq - q)·scale. In an ignored row it is 0, except that NaN in x stays NaN, as in torch.
  const A factor = static_cast<A>(all_q) * (is_counted ? scale : A(0)) / exp_sum;

  if (!exists) return 0;
  if (rank == 0 && p.loss && p.in_place) static_cast<A*>(p.loss)[row] = static_cast<A>(loss);
  if (rank == 0 && p.loss && !p.in_place) narrow(static_cast<A>(loss), static_cast<T*>(p.loss) + row);
  const int64_t grad_offset = offset(p.grad_strides), grad_stride = p.grad_strides.cls;
  if (p.grad) {
    logits.each_run([&](int64_t c, int valid, const A(&v)[Row::kWidth]) {
      A grad[Row::kWidth], q[Row::kWidth] = {};
      if (soft) soft_q(c, valid, q);
#pragma unroll
      for (int e = 0; e < Row::kWidth; ++e) {
        if (e >= valid) continue;
        if (c + e == target)
          q[e] = target_grad;
        else if (soft)
          q[e] *= scale;
        else if (terms.dense && is_counted)
          q[e] = class_weight<A>(p, c + e) * O::lit(terms.uniform_share) * scale;
        grad[e] = O::exp(v[e] - largest) * factor - q[e];
      }
      if (p.in_place)
        store_run<T>(static_cast<T*>(p.grad) + grad_offset, grad_stride, c, valid, grad);
      else
        store_run<A>(static_cast<A*>(p.grad) + grad_offset, grad_stride, c, valid, grad);
    });
  }
  if (p.grad_soft) {
    logits.each_run([&](int64_t c, int valid, const A(&v)[Row::kWidth]) {
      A grad[Row::kWidth];
#pragma unroll
      for (int e = 0; e < Row::kWidth; ++e)
        if (e < valid)
          grad[e] = class_weight<A>(p, c + e) * O::lit(-terms.target_share) * scale * (v[e] - largest - log_sum);
      store_run<A>(static_cast<A*>(p.grad_soft) + grad_offset, grad_stride, c, valid, grad);
    });
  }
  return rank == 0 ? loss : 0;
}

// kTeam threads share a row and hold kPer classes each. kPer = 0: any number of classes, in shared memory if `cached`.
// A thread that holds 32 classes may need more registers than two blocks have.
template <class T, int kTeam, int kPer>
__global__ void __launch_bounds__(kLossThreads, kPer > 8 ? 1 : 2)
    cross_entropy_kernel(const CrossEntropy p, const bool cached) {
  using A = Acc<T>;
  using O = Ops<A>;
  constexpr int kRows = kLossThreads / kTeam;
  RowTerms<A> terms{O::lit(p.scale), p.classes ? p.smoothing / p.classes : 0, 1 - p.smoothing,
                    static_cast<double>(p.classes), !p.target || p.smoothing > 0};
  if (p.mean && p.target) terms.scale = static_cast<A>(1 / total_count(counts_of(p), count_blocks(p)));
  if (p.lift) terms.scale *= *static_cast<const A*>(p.lift);
  if (p.weight && p.target && terms.dense) terms.weight_sum = total_count(counts_of(p) + kCountBlocks, count_blocks(p));

  T* const cache = cached ? reinterpret_cast<T*>(dynamic_shared()) : nullptr;
  const int64_t rows = p.outer * p.inner;
  double total = 0;
  // Teams beyond the last row compute the last row again, because all lanes of a warp take part in reductions. In place
  // they may read its gradient instead of x; their result is not used.
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < rows; first += int64_t{gridDim.x} * kRows) {
    const int64_t row = first + threadIdx.x / kTeam;
    total += cross_entropy_row<T, kTeam, kPer>(p, terms, min(row, rows - 1), row < rows, cache);
  }
  total = LossBlock::sum(total);
  if (threadIdx.x == 0) p.sums[blockIdx.x] = total;
}

// ---- reduction ------------------------------------------------------------------------------------------------------

// Add up the blocks' sums, in one block, and divide by `denominator`, or by what count_kernel summed.
template <class T>
__global__ void __launch_bounds__(kLossThreads) reduce_loss_kernel(const double* sums, int blocks, const double* counts,
                                                                   int count_blocks, double denominator, T* loss) {
  double total = 0;
  for (int i = threadIdx.x; i < blocks; i += kLossThreads) total += sums[i];
  total = LossBlock::sum(total);
  if (counts) denominator = total_count(counts, count_blocks);
  if (threadIdx.x == 0) narrow(static_cast<Acc<T>>(total / denominator), loss);
}

}  // namespace dlk::cuda
