#include "python/routes.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "planning/routes.h"
#include "python/names.h"

namespace dlk::python {
namespace {

namespace py = pybind11;

using Row = std::tuple<std::string, std::string, int64_t, int64_t, int64_t, int, std::string, std::string, int>;
using OfMlp = std::tuple<std::string, std::string, int64_t, std::vector<int64_t>, int, std::string, std::string, int>;

Op op_named(const std::string& op) {
  if (op == "forward") return Op::forward;
  if (op == "dgrad") return Op::dgrad;
  if (op == "wgrad") return Op::wgrad;
  throw std::invalid_argument("expected forward, dgrad or wgrad, got " + op);
}

Path path_named(const std::string& path) {
  for (int index = 0; index <= static_cast<int>(Path::fused_mlp); ++index)
    if (path == name(static_cast<Path>(index))) return static_cast<Path>(index);
  throw std::invalid_argument("expected the name of a path, got " + path);
}

// Tables are few and small, and plans of other threads may still read one that is no longer in use: none is freed.
std::vector<std::unique_ptr<const RouteTable>>& tables() {
  static std::vector<std::unique_ptr<const RouteTable>> kept;
  return kept;
}

Direction direction_named(const std::string& op) {
  if (op == "mlp_forward") return Direction::forward;
  if (op == "mlp_backward") return Direction::backward;
  throw std::invalid_argument("expected mlp_forward or mlp_backward, got " + op);
}

bool is_fused(const std::string& path) {
  if (path == "fused_mlp") return true;
  if (path == "layers") return false;
  throw std::invalid_argument("expected fused_mlp or layers, got " + path);
}

void check_row(const std::vector<int64_t>& sizes, int where, int table) {
  if (std::any_of(sizes.begin(), sizes.end(), [](int64_t size) { return size < 1; }) || where < 0)
    throw std::invalid_argument("expected sizes of at least 1");
  if (table < 0) throw std::invalid_argument("expected the number of a table, 0 for the first");
}

int make_routes(const std::vector<Row>& rows, const std::vector<OfMlp>& mlps) {
  std::vector<RouteRow> read;
  for (const auto& [op, dtype, m, n, k, where, path, why, table] : rows) {
    check_row({m, n, k}, where, table);
    read.push_back({op_named(op), dtype_named(dtype), {m, n, k}, where, path_named(path), why, table});
  }
  std::vector<MlpRow> chains;
  for (const auto& [op, dtype, m, features, where, path, why, table] : mlps) {
    check_row(features, where, table);
    if (m < 1 || features.size() < 3) throw std::invalid_argument("expected rows, and features of two layers or more");
    chains.push_back({direction_named(op), dtype_named(dtype), m, features, where, is_fused(path), why, table});
  }
  tables().push_back(std::make_unique<const RouteTable>(std::move(read), std::move(chains)));
  return static_cast<int>(tables().size()) - 1;
}

int in_use[2] = {-1, -1};

// Returns the table that was in use.
int use_routes(int table, bool cuda) {
  const auto& kept = tables();
  if (table < -1 || table >= static_cast<int>(kept.size()))
    throw std::invalid_argument("expected a table of make_routes, or -1 for none; got " + std::to_string(table));
  const RouteTable* chosen = table < 0 ? nullptr : kept[table].get();
  cuda ? use_cuda_routes(chosen) : use_cpu_routes(chosen);
  return std::exchange(in_use[cuda], table);
}

}  // namespace

void add_routes(py::module_& m) {
  m.def(
      "make_routes", &make_routes,
      "Make a route table of rows (op, dtype, m, n, k, where, path, why, table) and return its number. `where` is the "
      "number of threads, 0 for any; on CUDA the architecture. Rows of a lower `table` take precedence. `mlps` are "
      "rows of "
      "chains (op, dtype, m, features, where, path, why, table).",
      py::arg("rows"), py::arg("mlps") = std::vector<OfMlp>());
  m.def("use_routes", &use_routes,
        "Let all layers of the process take the routes of a table from now on (-1: of none). Returns the number of the "
        "table before.",
        py::arg("table"), py::arg("cuda") = false);
}

}  // namespace dlk::python
