#include "planning/routes.h"

#include <atomic>
#include <utility>

namespace dlk {
namespace {

std::atomic<const RouteTable*> of_cpu{nullptr}, of_cuda{nullptr};

uint64_t floor_log2(int64_t v) { return 63 - static_cast<uint64_t>(__builtin_clzll(static_cast<uint64_t>(v))); }

}  // namespace

RouteTable::Key RouteTable::key_of(bool of_class, Op op, DType dtype, const Shape& shape, int where) {
  const auto [m, n, k] = shape;
  const uint64_t rest = static_cast<uint64_t>(where) << 8 | static_cast<uint64_t>(op) << 4 |
                        static_cast<uint64_t>(dtype) << 1 | (of_class ? 1u : 0u);
  if (of_class) return {floor_log2(m), floor_log2(n), floor_log2(k), rest};
  return {static_cast<uint64_t>(m), static_cast<uint64_t>(n), static_cast<uint64_t>(k), rest};
}

// The slot of the key, or the unused slot where it belongs.
RouteTable::Slot& RouteTable::slot(const Key& key) {
  uint64_t hash = key.rest;
  for (const uint64_t part : {key.m, key.n, key.k}) hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
  for (size_t at = hash >> 32;; ++at) {
    Slot& here = slots_[at & (slots_.size() - 1)];
    const bool same = here.key.m == key.m && here.key.n == key.n && here.key.k == key.k && here.key.rest == key.rest;
    if (!here.used || same) return here;
  }
}

const RouteTable::Slot* RouteTable::found(const Key& key) const {
  const Slot& here = const_cast<RouteTable*>(this)->slot(key);  // it changes nothing
  return here.used ? &here : nullptr;
}

RouteTable::RouteTable(std::vector<RouteRow> rows) : rows_(std::move(rows)) {
  size_t size = 4;
  while (size < 4 * rows_.size()) size *= 2;  // two keys for each row
  slots_.resize(size);
  for (const RouteRow& row : rows_) {
    (row.where ? for_some_ : for_any_) = true;
    const Key exact = key_of(false, row.op, row.dtype, row.shape, row.where);
    if (Slot& here = slot(exact); !here.used) here = {exact, &row, true};
    const Key of_class = key_of(true, row.op, row.dtype, row.shape, row.where);
    Slot& here = slot(of_class);
    if (!here.used)
      here = {of_class, &row, true};
    else if (is_library(row.path))
      here.row = &row;
    else if (here.row && here.row->path != row.path && !is_library(here.row->path))
      here.row = nullptr;
  }
}

const RouteRow* RouteTable::find(Op op, DType dtype, const Shape& shape, int where) const {
  const RouteRow* row = for_some_ ? at(op, dtype, shape, where) : nullptr;
  return row || !for_any_ ? row : at(op, dtype, shape, 0);
}

const RouteRow* RouteTable::at(Op op, DType dtype, const Shape& shape, int where) const {
  if (const Slot* exact = found(key_of(false, op, dtype, shape, where))) return exact->row;
  const Slot* of_class = found(key_of(true, op, dtype, shape, where));
  return of_class ? of_class->row : nullptr;
}

const RouteTable* cpu_routes() { return of_cpu.load(std::memory_order_acquire); }
const RouteTable* cuda_routes() { return of_cuda.load(std::memory_order_acquire); }
void use_cpu_routes(const RouteTable* table) { of_cpu.store(table, std::memory_order_release); }
void use_cuda_routes(const RouteTable* table) { of_cuda.store(table, std::memory_order_release); }

}  // namespace dlk
