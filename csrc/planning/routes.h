// A route table: for products and chains of measured sizes, the path that was measured fastest. Python reads the file, checks
// it, and hands the rows over (csrc/python/routes.cpp); the routes of each device ask it first.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "planning/plan.h"

namespace dlk {

struct RouteRow {
  Op op;
  DType dtype;
  Shape shape;      // of the layer that was measured
  int where;        // CPU: the number of threads, 0 for any; CUDA: the architecture, 90 for 9.0
  Path path;        // measured fastest
  std::string why;  // as explain() prints it: table, row, measurement
  int table = 0;    // the number of its table; lower ones take precedence
};

struct MlpRow {
  Direction direction;
  DType dtype;
  int64_t m;
  std::vector<int64_t> features;  // of the chain's input, and of the output of each layer
  int where;                      // as in RouteRow
  bool fused;                     // measured fastest: one kernel for all layers; else layer by layer
  std::string why;
  int table = 0;
};

// The rows of one or more tables. Immutable, so any number of threads may ask it. A row stands for its own sizes, and for all
// sizes of the same class: the same floor(log2) of each of M, N and K. Where the rows of a class differ in one table, its other
// sizes take the library's path if a row names it, and no path of the table if none does.
class RouteTable {
 public:
  explicit RouteTable(std::vector<RouteRow> rows, std::vector<MlpRow> mlps = {});
  RouteTable(const RouteTable&) = delete;
  RouteTable& operator=(const RouteTable&) = delete;

  // A row of these sizes comes before one of their class; among equals the lower table's, and of one table a row for `where`
  // before one for any. Sizes are at least 1. nullptr: nothing was measured for sizes like these. The row lives as long as the
  // table.
  const RouteRow* find(Op, DType, const Shape&, int where) const;

  // A row stands for chains of its very features, at all m between the same powers of two. The row of the nearest m counts, of
  // two the one of fewer rows; among equals the order is that of find().
  const MlpRow* find_mlp(Direction, DType, const std::vector<Shape>& layers, int where) const;
  bool has_mlps() const { return !mlps_.empty(); }

 private:
  struct Key {
    uint64_t m, n, k, rest;
  };
  struct Slot {
    Key key;
    const RouteRow* row;  // nullptr: the rows of the class differ
    bool used;
  };
  struct Source {
    int table;
    bool some, any;  // it has rows with a `where`, and without
  };
  static Key exact_key(Op, DType, const Shape&, int where);
  static Key class_key(Op, DType, const Shape&, int where, int table);
  Slot& slot(const Key&);
  const Slot* found(const Key&) const;

  std::vector<RouteRow> rows_;
  std::vector<Slot> slots_;      // open addressing; at least half of them are unused
  std::vector<Source> sources_;  // the tables of rows_, ascending
  std::vector<MlpRow> mlps_;     // sorted by chain, dtype and direction
};

// The tables of this process, nullptr for none. A table that is in use must stay in memory to the end of the process,
// because plans of other threads may still read it.
const RouteTable* cpu_routes();
const RouteTable* cuda_routes();
void use_cpu_routes(const RouteTable*);
void use_cuda_routes(const RouteTable*);

}  // namespace dlk
