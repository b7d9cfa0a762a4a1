// Planning with C signatures, for ctypes. No kernel is linked: tables say which kernels there would be, and the questions
// that CUDA's plans ask of a device are answered here.
#include <cstring>
#include <string>

#include "planning/cpu/linear_glu.h"
#include "planning/cpu/plan.h"
#include "planning/cpu/route.h"
#include "planning/cuda/linear_cross_entropy.h"
#include "planning/cuda/linear_glu.h"
#include "planning/cuda/plan.h"

using namespace dlk;

namespace {

void no_product(const Gemm&, const cpu::Parallel&) {}
int64_t no_panels(const Gemm&, int) { return 0; }

cpu::Kernels kernels_of(const char* isa, bool pairs) {
  cpu::Kernels set{};
  set.isa = isa;
  for (cpu::KernelTable& table : set.table) {
    table.packed = {nullptr, &no_panels, true};
    table.fused_mlp = {256, 24, nullptr, nullptr};
  }
  set.table[static_cast<int>(DType::bf16)].tiles_forward.most_rows = 512;  // only of amx; run says whether it is there
  if (!std::strcmp(isa, "amx")) {
    set.table[static_cast<int>(DType::bf16)].tiles_forward.run = &no_product;
    set.table[static_cast<int>(DType::bf16)].fused_mlp.block_rows = 96;
  }
  if (pairs) {
    set.f32_in_bf16 = {"f32 rounded to bf16", {nullptr, &no_panels, false}};
    set.autocast.ukernel = "f32 rounded to bf16";
    for (cpu::AutocastLayer* layer : {&set.autocast.f32_x, &set.autocast.bf16_x})
      layer->packed = {{nullptr, &no_panels, true}, {nullptr, &no_panels, true}, {nullptr, &no_panels, true}};
  }
  return set;
}

// "dgrad packed dx load below 1|wgrad packed dweight+dbias load - 3": kind, path, outputs, where dz is made, the layer
// below, slices.
// A step's outputs by name. Of the second half of a gated layer they end in _up.
std::string outputs_of(unsigned outputs) {
  constexpr const char* kNames[] = {"y",     "z",           "mask", "dz",    "dx",         "dweight",
                                    "dbias", "dbias_below", "z_up", "dz_up", "dweight_up", "dbias_up"};
  std::string text;
  for (int bit = 0; bit < 12; ++bit)
    if (outputs >> bit & 1) text += (text.empty() ? "" : "+") + std::string(kNames[bit]);
  return text;
}

const char* text_of(const Plan& plan) {
  static std::string text;
  text.clear();
  for (const Step& step : plan) {
    if (!text.empty()) text += "|";
    text += std::string(name(step.kind)) + " " + name(step.path) + " ";
    text += outputs_of(step.outputs) + (step.dz_in_load ? " load" : " -") + (step.below ? " below " : " - ") +
            std::to_string(step.splits);
  }
  return text.c_str();
}

// The parts of a gated layer's plan: "fused", gate, up, dgrad of both, the pass, how dx is added up.
const char* text_of(const GluPlan& plan) {
  constexpr const char* kSums[] = {"apart", "rounded", "unrounded"};
  static std::string text;
  text = plan.fused ? "fused;" : ";";
  for (const Plan* part : {&plan.gate, &plan.up, &plan.both, &plan.dgrad}) text += std::string(text_of(*part)) + ";";
  text += outputs_of(plan.pass.outputs) + ";" + kSums[static_cast<int>(plan.dx_sum)];
  return text.c_str();
}

std::vector<RouteRow> next_rows;
std::vector<MlpRow> next_mlps;

std::vector<Shape> chain_of(int64_t m, const int64_t* features, int count) {
  std::vector<Shape> layers;
  for (int l = 1; l < count; ++l) layers.push_back({m, features[l], features[l - 1]});
  return layers;
}

cuda::RouteQuery asked(Op op, const Problem& p, const View& left, const View& right);
int given_arch, given_narrow;
Path given_path;
bool is_forced;

cuda::RouteQuery asked(Op op, const Problem& p, const View&, const View&) {
  return {op,
          p.shape,
          p.dtype,
          false,
          true,
          true,
          given_arch,
          true,
          given_narrow != 0,
          is_forced ? &given_path : nullptr,
          cuda_routes()};
}
int one_split(Path, Op, const Problem&) { return 1; }
int64_t no_scratch(const Step&, const Problem&) { return 0; }
constexpr cuda::Machine kDevice = {&asked, &one_split, &no_scratch};

}  // namespace

extern "C" {

// The table of all plans from now on: one row after the other by add_route, then use_routes. Tables are never freed.
void add_route(int op, int dtype, int64_t m, int64_t n, int64_t k, int where, const char* path, const char* why,
               int table) {
  for (int p = 0; p <= static_cast<int>(Path::fused_mlp); ++p)
    if (!std::strcmp(name(static_cast<Path>(p)), path))
      next_rows.push_back(
          {static_cast<Op>(op), static_cast<DType>(dtype), {m, n, k}, where, static_cast<Path>(p), why, table});
}
void add_mlp_route(int direction, int dtype, int64_t m, const int64_t* features, int count, int where, int fused,
                   const char* why, int table) {
  next_mlps.push_back({static_cast<Direction>(direction),
                       static_cast<DType>(dtype),
                       m,
                       {features, features + count},
                       where,
                       fused != 0,
                       why,
                       table});
}
void use_routes() {
  use_cpu_routes(next_rows.empty() && next_mlps.empty() ? nullptr : new RouteTable(next_rows, next_mlps));
  use_cuda_routes(cpu_routes());
  next_rows.clear();
  next_mlps.clear();
}

// The reason of the row for this chain; an empty text if there is none.
const char* found_mlp(int direction, int dtype, int64_t m, const int64_t* features, int count, int where) {
  const RouteTable* table = cpu_routes();
  const MlpRow* row = !table ? nullptr
                             : table->find_mlp(static_cast<Direction>(direction), static_cast<DType>(dtype),
                                               chain_of(m, features, count), where);
  return row ? row->why.c_str() : "";
}

// The path that the rows name; an empty text if they say nothing.
const char* found_route(int op, int dtype, int64_t m, int64_t n, int64_t k, int where) {
  const RouteTable* table = cpu_routes();
  const RouteRow* row = table ? table->find(static_cast<Op>(op), static_cast<DType>(dtype), {m, n, k}, where) : nullptr;
  return row ? name(row->path) : "";
}

// forced: 0 no, 1 own, 2 aten. wants: bits of Output. flags: 1 saved, 2 below, 4 dbias_below.
const char* cpu_backward(const char* isa, int pairs, int forced, int bf16_products, int64_t m, int64_t n, int64_t k,
                         int dtype, int act, int casts, unsigned wants, unsigned flags, int64_t x_col,
                         int64_t weight_col) {
  const cpu::Kernels set = kernels_of(isa, pairs != 0);
  const cpu::Machine machine = {
      &set, static_cast<cpu::Forced>(forced), false, false, false, bf16_products != 0, 4, cpu_routes()};
  const Problem p = {{m, n, k}, static_cast<DType>(dtype), {static_cast<Act>(act), 0}, static_cast<Casts>(casts)};
  return text_of(cpu::plan_backward({p,
                                     {nullptr, n, 1},
                                     (flags & 1) != 0,
                                     {nullptr, k, x_col},
                                     {nullptr, k, weight_col},
                                     (wants & kDx) != 0,
                                     (wants & kDweight) != 0,
                                     (wants & kDbias) != 0,
                                     (flags & 2) != 0,
                                     (flags & 4) != 0},
                                    machine));
}

const char* cpu_forward(const char* isa, int maker, int pairs, int forced, int64_t m, int64_t n, int64_t k, int dtype,
                        int act, int z) {
  const cpu::Kernels set = kernels_of(isa, pairs != 0);
  const cpu::Machine machine = {&set,         static_cast<cpu::Forced>(forced), false, false, false, false, 4,
                                cpu_routes(), static_cast<cpu::Maker>(maker)};
  const Problem p = {{m, n, k}, static_cast<DType>(dtype), {static_cast<Act>(act), 0}};
  return text_of(cpu::plan_forward({p, {nullptr, k, 1}, {nullptr, k, 1}, z != 0, false}, machine));
}

// The path of one product.
const char* cpu_route(const char* isa, int maker, int threads, int op, int64_t m, int64_t n, int64_t k, int dtype,
                      int act) {
  const cpu::Kernels set = kernels_of(isa, false);
  const cpu::Machine machine = {
      &set, cpu::Forced::no, false, false, false, false, threads, cpu_routes(), static_cast<cpu::Maker>(maker)};
  const Problem p = {{m, n, k}, static_cast<DType>(dtype), {static_cast<Act>(act), 0}};
  return name(cpu::route(static_cast<Op>(op), p, true, machine).path);
}

// "4 the reason": slices, why.
const char* cpu_mlp(const char* isa, int maker, int forced, int capped, int bf16_products, int threads, int direction,
                    int dtype, int64_t m, const int64_t* features, int count) {
  static std::string text;
  const cpu::Kernels set = kernels_of(isa, false);
  const cpu::Machine machine = {
      &set,         static_cast<cpu::Forced>(forced), capped != 0, false, false, bf16_products != 0, threads,
      cpu_routes(), static_cast<cpu::Maker>(maker)};
  const MlpRoute route = cpu::mlp_route(static_cast<Direction>(direction), chain_of(m, features, count),
                                        static_cast<DType>(dtype), machine);
  text = std::to_string(route.slices) + " " + route.why;
  return text.c_str();
}

// slices: those of the kernels, 0 if they do not take the chain.
const char* cuda_mlp(const char* path, int arch, int tf32, int slices, int direction, int dtype, int64_t m,
                     const int64_t* features, int count) {
  static std::string text;
  const Path forced = Path::mma;
  const MlpRoute route =
      cuda::mlp_route({static_cast<Direction>(direction), chain_of(m, features, count), static_cast<DType>(dtype),
                       tf32 != 0, arch, slices, *path ? &forced : nullptr, cuda_routes()});
  text = std::to_string(route.slices) + " " + route.why;
  return text.c_str();
}

// path: the one that is forced, or an empty text.
const char* cuda_backward(const char* path, int arch, int narrow, int64_t m, int64_t n, int64_t k, int dtype, int act,
                          unsigned wants, unsigned flags) {
  is_forced = *path != 0;
  for (int p = 0; is_forced && p <= static_cast<int>(Path::fused_mlp); ++p)
    if (!std::strcmp(name(static_cast<Path>(p)), path)) given_path = static_cast<Path>(p);
  given_arch = arch, given_narrow = narrow;
  const Problem p = {{m, n, k}, static_cast<DType>(dtype), {static_cast<Act>(act), 0}};
  return text_of(cuda::plan_backward({p,
                                      {nullptr, n, 1},
                                      (flags & 1) != 0,
                                      {nullptr, k, 1},
                                      {nullptr, k, 1},
                                      (wants & kDx) != 0,
                                      (wants & kDweight) != 0,
                                      (wants & kDbias) != 0,
                                      (flags & 2) != 0,
                                      (flags & 4) != 0},
                                     kDevice));
}

const char* cuda_forward(const char* path, int arch, int narrow, int64_t m, int64_t n, int64_t k, int dtype, int act,
                         int z, int mask) {
  is_forced = *path != 0;
  for (int p = 0; is_forced && p <= static_cast<int>(Path::fused_mlp); ++p)
    if (!std::strcmp(name(static_cast<Path>(p)), path)) given_path = static_cast<Path>(p);
  given_arch = arch, given_narrow = narrow;
  const Problem p = {{m, n, k}, static_cast<DType>(dtype), {static_cast<Act>(act), 0}};
  return text_of(cuda::plan_forward({p, {nullptr, k, 1}, {nullptr, k, 1}, z != 0, mask != 0}, kDevice));
}

// A gated layer of f32 or bf16. On CPU with the kernel set `isa`; on CUDA where it is empty.
const char* glu_forward(const char* isa, int forced, int64_t m, int64_t n, int64_t k, int dtype, int z, int packed) {
  const cpu::Kernels set = kernels_of(isa, false);
  const cpu::Machine machine = {&set, static_cast<cpu::Forced>(forced), false, false, false, false, 4, cpu_routes()};
  is_forced = false, given_arch = 90, given_narrow = 0;
  const GluForwardProblem p = {{{m, n, k}, static_cast<DType>(dtype), {Act::silu, 0}},
                               {nullptr, k, 1},
                               {nullptr, k, 1},
                               {nullptr, k, 1},
                               z != 0,
                               packed != 0};
  return text_of(*isa ? cpu::plan_glu_forward(p, machine) : cuda::plan_glu_forward(p, kDevice));
}

// needs: bits for dx, dweight_gate, dbias_gate, dweight_up, dbias_up. gate, up: addresses of the weights in bytes.
const char* glu_backward(const char* isa, int forced, int64_t m, int64_t n, int64_t k, int dtype, int needs,
                         int64_t gate, int64_t up, int one_memory) {
  const cpu::Kernels set = kernels_of(isa, false);
  const cpu::Machine machine = {&set, static_cast<cpu::Forced>(forced), false, false, false, false, 4};
  is_forced = false, given_arch = 90, given_narrow = 0;
  const GluBackwardProblem p = {{{m, n, k}, static_cast<DType>(dtype), {Act::silu, 0}},
                                {nullptr, k, 1},
                                {reinterpret_cast<const void*>(gate), k, 1},
                                {reinterpret_cast<const void*>(up), k, 1},
                                one_memory != 0,
                                (needs & 1) != 0,
                                (needs & 2) != 0,
                                (needs & 4) != 0,
                                (needs & 8) != 0,
                                (needs & 16) != 0};
  return text_of(*isa ? cpu::plan_glu_backward(p, machine) : cuda::plan_glu_backward(p, kDevice));
}

void loss_blocks(int64_t m, int64_t classes, int dtype, int64_t given, int64_t* rows, int64_t* blocks, int* one_layer) {
  const BlockPlan plan = cuda::plan_linear_cross_entropy({m, classes, 64}, static_cast<DType>(dtype), given);
  *rows = plan.rows, *blocks = plan.blocks, *one_layer = plan.one_layer;
}

}  // extern "C"
