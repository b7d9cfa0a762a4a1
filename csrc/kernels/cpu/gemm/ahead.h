// The memory that a task reads next. Micro-kernels prefetch it to L2 while they multiply, so that packing finds it there:
// a core alone has too few line fill buffers to read from L3 or from memory as fast as it packs.
namespace dlk::cpu::DLK_ISA {

// Rows of cache lines, `pitch` bytes apart.
struct RowsAhead {
  const char* at;
  int64_t rows, per_row, pitch;

  DLK_HD int64_t lines() const { return rows * per_row; }

  // `rows` rows of `bytes` contiguous bytes.
  static RowsAhead of(const void* at, int64_t rows, int64_t bytes, int64_t pitch) {
    const int64_t behind_line = (int64_t)at & 63;
    return {(const char*)at - behind_line, rows, ceil_div(behind_line + bytes, 64), pitch};
  }

  // Rows i0 .. i0 + rows and columns j0 .. j0 + cols of a view. There are none where neither direction is contiguous.
  template <class T>
  static RowsAhead of_block(const View& v, int64_t i0, int64_t rows, int64_t j0, int64_t cols) {
    const T* at = (const T*)v.data + i0 * v.row_stride + j0 * v.col_stride;
    if (v.col_stride == 1) return of(at, rows, cols * sizeof(T), v.row_stride * sizeof(T));
    if (v.row_stride == 1) return of(at, cols, rows * sizeof(T), v.col_stride * sizeof(T));
    return {};
  }
};

// A queue of such rows, and the place in it.
struct Ahead {
  RowsAhead queue[2];
  int first = 0, end = 0;
  int64_t row = 0, line = 0;  // of queue[first]

  void add(const RowsAhead& rows) {
    if (rows.lines() > 0) queue[end++] = rows;
  }
  int64_t lines() const {
    int64_t sum = 0;
    for (int i = first; i < end; ++i) sum += queue[i].lines();
    return sum;
  }
  DLK_INLINE bool empty(const Ahead& a) { return a.first == a.end; }
  // Return the place, for a micro-kernel.
  DLK_INLINE LinesAhead here(const Ahead& a) {
    const RowsAhead& q = a.queue[a.first];
    return {q.at + a.row * q.pitch + a.line * 64, q.per_row - a.line, q.per_row, q.pitch - q.per_row * 64};
  }
  // Go on by the lines that a micro-kernel has prefetched. It prefetches whatever lies behind the last row, too.
  DLK_INLINE void pass(Ahead& a, int64_t lines) {
    const RowsAhead& q = a.queue[a.first];
    for (a.line += lines; a.line >= q.per_row; a.line -= q.per_row) ++a.row;
    if (a.row >= q.rows) ++a.first, a.row = a.line = 0;
  }
  // Call multiply(next), which runs a micro-kernel of so many cells along k. `next` is nullptr where the queue is empty.
  template <class Multiply>
  DLK_INLINE void serve(Ahead& a, int64_t cells, Multiply multiply) {
    if (empty(a)) return multiply(nullptr);
    const LinesAhead next = here(a);
    multiply(&next);
    pass(a, ceil_div(cells, kStepsPerLine));
  }
};

}  // namespace dlk::cpu::DLK_ISA
