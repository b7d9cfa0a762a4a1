#include "planning/routes.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <tuple>
#include <utility>

namespace dlk {
namespace {

std::atomic<const RouteTable*> of_cpu{nullptr}, of_cuda{nullptr};

// Below bit 40. Keys of sizes have zeros above, keys of classes the number of their table and 1.
uint64_t rest_of(Op op, DType dtype, int where) {
  return static_cast<uint64_t>(where) << 8 | static_cast<uint64_t>(op) << 4 | static_cast<uint64_t>(dtype);
}

uint64_t floor_log2(int64_t v) { return 63 - static_cast<uint64_t>(__builtin_clzll(static_cast<uint64_t>(v))); }

// Below 0: the chain of the row comes before these layers in the order of mlps_. 0: it is theirs.
int compared(const MlpRow& row, Direction direction, DType dtype, const std::vector<Shape>& layers) {
  const auto three_way = [](auto a, auto b) { return a < b ? -1 : a > b ? 1 : 0; };
  if (const int order = three_way(row.features.size(), layers.size() + 1)) return order;
  for (size_t l = 0; l < layers.size(); ++l)
    if (const int order = three_way(row.features[l + 1], layers[l].n)) return order;
  if (const int order = three_way(row.features[0], layers[0].k)) return order;
  if (const int order = three_way(row.dtype, dtype)) return order;
  return three_way(row.direction, direction);
}

std::vector<Shape> layers_of(const MlpRow& row) {
  std::vector<Shape> layers;
  for (size_t l = 1; l < row.features.size(); ++l) layers.push_back({row.m, row.features[l], row.features[l - 1]});
  return layers;
}

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

RouteTable::RouteTable(std::vector<RouteRow> rows, std::vector<MlpRow> mlps)
    : rows_(std::move(rows)), mlps_(std::move(mlps)) {
  std::stable_sort(mlps_.begin(), mlps_.end(), [](const MlpRow& a, const MlpRow& b) {
    return compared(a, b.direction, b.dtype, layers_of(b)) < 0;
  });
  size_t size = 4;
  while (size < 4 * rows_.size()) size *= 2;  // two keys for each row
  slots_.resize(size);
  for (const RouteRow& row : rows_) {
    const auto at = std::lower_bound(sources_.begin(), sources_.end(), row.table,
                                     [](const Source& source, int table) { return source.table < table; });
    Source& source =
        at != sources_.end() && at->table == row.table ? *at : *sources_.insert(at, Source{row.table, false, false});
    (row.where ? source.some : source.any) = true;
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
  const Slot* here = found(exact_key(op, dtype, shape, where));
  const Slot* anywhere = found(exact_key(op, dtype, shape, 0));
  if (here && (!anywhere || here->row->table <= anywhere->row->table)) return here->row;
  if (anywhere) return anywhere->row;
  for (const auto& [table, some, any] : sources_)
    for (const auto& [has_rows, place] : {std::pair{some, where}, std::pair{any, 0}})
      if (const Slot* of_class = has_rows ? found(class_key(op, dtype, shape, place, table)) : nullptr)
        if (of_class->row) return of_class->row;
  return nullptr;
}

const MlpRow* RouteTable::find_mlp(Direction direction, DType dtype, const std::vector<Shape>& layers,
                                   int where) const {
  if (mlps_.empty() || layers.empty() || layers[0].m < 1) return nullptr;
  const int64_t m = layers[0].m;
  const auto rank = [&](const MlpRow& row) {
    return std::make_tuple(std::abs(row.m - m), row.m, row.table, row.where == 0);
  };
  const MlpRow* best = nullptr;
  auto row = std::partition_point(mlps_.begin(), mlps_.end(),
                                  [&](const MlpRow& one) { return compared(one, direction, dtype, layers) < 0; });
  for (; row != mlps_.end() && compared(*row, direction, dtype, layers) == 0; ++row) {
    const bool counts = (row->where == 0 || row->where == where) && floor_log2(row->m) == floor_log2(m);
    if (counts && (!best || rank(*row) < rank(*best))) best = &*row;
  }
  return best;
}

const RouteTable* cpu_routes() { return of_cpu.load(std::memory_order_acquire); }
const RouteTable* cuda_routes() { return of_cuda.load(std::memory_order_acquire); }
void use_cpu_routes(const RouteTable* table) { of_cpu.store(table, std::memory_order_release); }
void use_cuda_routes(const RouteTable* table) { of_cuda.store(table, std::memory_order_release); }

}  // namespace dlk
