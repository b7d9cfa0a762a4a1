#include "planning/routes.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace dlk {
namespace {

std::atomic<const RouteTable*> of_cpu{nullptr}, of_cuda{nullptr};

// Below bit 40. Keys of sizes have zeros above, keys of classes the number of their table and 1.
uint64_t rest_of(Op op, DType dtype, int where) {
  return static_cast<uint64_t>(where) << 8 | static_cast<uint64_t>(op) << 4 | static_cast<uint64_t>(dtype);
}

void insert(std::vector<int>& ascending, int value) {
  const auto at = std::lower_bound(ascending.begin(), ascending.end(), value);
  if (at == ascending.end() || *at != value) ascending.insert(at, value);
}

uint64_t floor_log2(int64_t v) { return 63 - static_cast<uint64_t>(__builtin_clzll(static_cast<uint64_t>(v))); }

}  // namespace

RouteTable::Key RouteTable::exact_key(Op op, DType dtype, const Shape& shape, int where) {
  const auto [m, n, k] = shape;
  return {static_cast<uint64_t>(m), static_cast<uint64_t>(n), static_cast<uint64_t>(k), rest_of(op, dtype, where)};
}

RouteTable::Key RouteTable::class_key(Op op, DType dtype, const Shape& shape, int where, int table) {
  const auto [m, n, k] = shape;
  return {floor_log2(m), floor_log2(n), floor_log2(k),
          rest_of(op, dtype, where) | static_cast<uint64_t>(table + 1) << 40};
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
    insert(row.where ? for_some_ : for_any_, row.table);
    const Key exact = exact_key(row.op, row.dtype, row.shape, row.where);
    if (Slot& here = slot(exact); !here.used || row.table < here.row->table) here = {exact, &row, true};
    const Key of_class = class_key(row.op, row.dtype, row.shape, row.where, row.table);
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
  const std::pair<int, const std::vector<int>*> places[] = {{where, &for_some_}, {0, &for_any_}};
  for (const auto& [place, tables] : places)
    if (!tables->empty())
      if (const Slot* exact = found(exact_key(op, dtype, shape, place))) return exact->row;
  for (const auto& [place, tables] : places)
    for (const int table : *tables)
      if (const Slot* of_class = found(class_key(op, dtype, shape, place, table)))
        if (of_class->row) return of_class->row;
  return nullptr;
}

const RouteTable* cpu_routes() { return of_cpu.load(std::memory_order_acquire); }
const RouteTable* cuda_routes() { return of_cuda.load(std::memory_order_acquire); }
void use_cpu_routes(const RouteTable* table) { of_cpu.store(table, std::memory_order_release); }
void use_cuda_routes(const RouteTable* table) { of_cuda.store(table, std::memory_order_release); }

}  // namespace dlk
