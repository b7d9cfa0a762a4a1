// The CPU: its table of functions. Kernels run on torch's own threads.
#include "ops/cpu/device.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "ops/check.h"
#include "planning/cpu/linear_glu.h"
#include "planning/cpu/plan.h"
#include "planning/cpu/route.h"

namespace dlk {
namespace cpu {
namespace {

at::Tensor accumulators_of(int64_t count, DType dtype) {
  return new_empty({count}, at::TensorOptions().dtype(dtype == DType::f64 ? at::kDouble : at::kFloat));
}

int64_t multiplications(const Problem& c) { return c.shape.m * c.shape.n * c.shape.k; }

// torch lets f32 products run in bf16: set_float32_matmul_precision("medium"), torch.backends.mkldnn.
bool bf16_products_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
         at::Float32Precision::BF16;
}

void few_rows(const Step& step, const Problem& c, const Gemm& p, const Machine& machine, const Parallel& threads) {
  const KernelTable& table = machine.table(c.dtype);
  const AutocastLayer* layer = machine.autocast(c.casts);
  switch (step.kind) {
    case StepKind::forward: {
      const FewForward& tiles = table.tiles_forward;
      const bool by_tiles = tiles.run && c.shape.m >= tiles.least_rows;
      return (layer ? layer->few_rows.forward : by_tiles ? tiles.run : table.few_forward.run)(p, threads);
    }
    case StepKind::dgrad: return (layer ? layer->few_rows.dgrad : table.few_dgrad)(p, threads);
    default: return (layer ? layer->few_rows.wgrad : table.few_wgrad)(p, threads);
  }
}

void run_product(const Step& step, const Problem& c, Product p, const at::Tensor&) {
  const Machine machine = machine_for(c.dtype, step.path == Path::packed);
  if (step.path == Path::packed) {
    const Op op = step.kind == StepKind::forward ? Op::forward : step.kind == StepKind::dgrad ? Op::dgrad : Op::wgrad;
    return packed_gemm(machine.packed(c, op), p, machine);
  }
  const Parallel threads = torch_threads(machine.threads_for(multiplications(c)));
  if (step.path == Path::few_rows) return few_rows(step, c, p, machine, threads);
  machine.table(c.dtype).few_columns_forward(p, threads);
}

void few_columns_backward(const Step& step, const Problem& c, const OutputGrad& in, const at::Tensor& x,
                          const at::Tensor& weight, const Gradients& wanted) {
  const auto [m, n, k] = c.shape;
  const auto& [dx, dweight, dbias] = wanted;
  ColumnsBackward p = {m, n, k, view_of(in.g)};
  if (in.saved.defined()) p.saved = view_of(in.saved), p.act = c.act;
  if (dx.defined()) p.weight = view_of(weight), p.dx = dx.data_ptr();
  if (dweight.defined()) p.x = view_of(x), p.dweight = dweight.data_ptr();
  p.dbias = data_or_null(dbias);
  at::Tensor partials;
  if (step.splits > 1) {
    partials = accumulators_of(step.splits * n * (k + 1), c.dtype);
    p.partials = partials.data_ptr();
  }
  const Machine machine = machine_for(c.dtype, false);
  machine.table(c.dtype).few_columns_backward(p, torch_threads(machine.threads_for(multiplications(c))));
}

void run_activation_pass(const Problem& c, const at::Tensor& z, const at::Tensor& bias, const at::Tensor& y,
                         const at::Tensor&) {
  const Machine machine = machine_for(c.dtype, false);
  const auto [m, n, k] = c.shape;
  const KernelTable& table = machine.table(c.dtype);
  const Parallel threads = threads_for_elements(machine, m * n);
  if (!bias.defined()) return table.act_pass({m * n, z.const_data_ptr(), c.act, y.data_ptr()}, threads);
  void* const z_sum = z.is_same(y) ? nullptr : z.data_ptr();
  table.bias_act_pass({m, n, z.const_data_ptr(), bias.const_data_ptr(), c.act, y.data_ptr(), z_sum}, threads);
}

// In 16 bits the product would be rounded before the bias is added.
bool pass_adds_bias(DType dtype) { return !is_16_bit(dtype); }

void run_derivative_pass(const DerivativePass& p, DType dtype) {
  const Machine machine = machine_for(dtype, false);
  machine.table(dtype).derivative_pass(p, threads_for_elements(machine, p.count));
}

void run_glu_pass(const Problem& c, const GluPass& p) {
  const Machine machine = machine_for(c.dtype, false);
  machine.table(c.dtype).glu_pass(p, threads_for_elements(machine, p.m * p.n));
}

void run_glu_gradient_pass(GluGradPass p, const at::Tensor& like) {
  at::Tensor partials;
  if (p.dbias_gate || p.dbias_up) {
    partials = accumulators(((p.dbias_gate != nullptr) + (p.dbias_up != nullptr)) * slices(p.m) * p.n, like);
    p.partials = partials.data_ptr();
  }
  const Machine machine = machine_for(p.dtype, false);
  machine.table(p.dtype).glu_grad_pass(p, threads_for_elements(machine, 2 * p.m * p.n));
}

MlpRoute route_of_mlp(Direction direction, const std::vector<Shape>& layers, DType dtype) {
  const RouteTable* routes = cpu_routes();
  return mlp_route(direction, layers, dtype, machine_for(dtype, routes && routes->has_mlps()));
}

Parallel threads_for_mlp(const FusedMlp& p, const Machine& machine) {
  int64_t multiplications = 0;
  for (int l = 0; l < p.layers; ++l) multiplications += p.rows * p.layer[l].n * p.layer[l].k;
  return torch_threads(machine.threads_for(multiplications));
}

void run_fused_mlp_forward(const FusedMlp& p, DType dtype) {
  const Machine machine = machine_for(dtype, false);
  machine.table(dtype).fused_mlp.forward(p, threads_for_mlp(p, machine));
}

void run_fused_mlp_backward(FusedMlp p, DType dtype, const at::Tensor& like) {
  const Machine machine = machine_for(dtype, false);
  const at::Tensor partials = accumulators(p.slices * fused_mlp_parameters(p), like);
  p.partials = partials.data_ptr();
  machine.table(dtype).fused_mlp.backward(p, threads_for_mlp(p, machine));
}

void each_member(int64_t members, const std::vector<Problem>& layers, c10::function_ref<void(int64_t)> body) {
  const Machine machine = machine_for(layers[0].dtype);
  const int threads = members_in_parallel(members, layers, machine) ? machine.threads : 1;
  torch_threads(threads).run(members, &body, [](const void* context, int64_t begin, int64_t end) {
    // member_of gives tensors without a version counter. A library's product may write to them below the key that counts.
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t e = begin; e < end; ++e) (*static_cast<const c10::function_ref<void(int64_t)>*>(context))(e);
  });
}

Machine machine_that_runs(const Problem& p, bool asks_precision) {
  const Machine machine = machine_for(p.dtype, asks_precision);
  TORCH_CHECK_NOT_IMPLEMENTED(p.casts == Casts::none || machine.converts_parameters(),
                              "linear_act: no products of bfloat16 on this CPU; cast x, weight and bias first");
  return machine;
}

}  // namespace

Machine machine_for(DType dtype, bool asks_precision) {
  return this_machine(at::get_num_threads(), asks_precision && dtype == DType::f32 && bf16_products_allowed());
}

Parallel torch_threads(int threads) {
  if (threads == 1 || at::in_parallel_region())  // plans do not depend on the region: it has the bits of a call outside
    return {1, [](int64_t tasks, const void* context, void (*body)(const void*, int64_t, int64_t)) {
              if (tasks > 0) body(context, 0, tasks);
            }};
  return {threads, [](int64_t tasks, const void* context, void (*body)(const void*, int64_t, int64_t)) {
            at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

Parallel threads_for_elements(const Machine& machine, int64_t elements) {
  return torch_threads(machine.threads_for(elements * 16));
}

void packed_gemm(const PackedProduct& product, Gemm p, const Machine& machine) {
  const Parallel threads = torch_threads(machine.threads_for(p.m * p.n * p.k));
  at::Tensor panels, partials;
  if (p.splits > 1) {
    partials = accumulators_of(partials_size(p), p.dtype);
    p.partials = partials.data_ptr();
  }
  if (const int64_t bytes = product.panels_size(p, threads.threads)) {
    panels = new_empty({bytes}, at::TensorOptions().dtype(at::kByte));
    p.panels = panels.data_ptr();
  }
  product.gemm(p, threads);
}

void gradient_pass(const Problem& c, const OutputGrad& in, const at::Tensor& dz, const at::Tensor& dbias) {
  const auto [m, n, k] = c.shape;
  GradPass p{};
  p.dtype = c.dtype;
  p.m = m, p.n = n;
  p.g = view_of(in.g);
  if (in.saved.defined()) p.saved = view_of(in.saved), p.act = c.act;
  p.dz = data_or_null(dz), p.dbias = data_or_null(dbias);
  at::Tensor partials;
  if (dbias.defined()) {
    if (dbias.scalar_type() != in.g.scalar_type()) p.output_mode = OutputMode::uncast;
    partials = accumulators(slices(m) * n, in.g);
    p.partials = partials.data_ptr();
  }
  const Machine machine = machine_for(c.dtype, false);
  machine.table(c.dtype).grad_pass(p, threads_for_elements(machine, m * n));
}

at::Tensor library_operand(const at::Tensor& a) {
  constexpr int64_t piece = 32;
  const int64_t m = a.size(0), k = a.size(1);
  if (a.element_size() != 2 || k % piece == 0) return a;
  at::Tensor copy = aten::zeros({m, (k / piece + 1) * piece}, a.options()).narrow(1, 0, k);
  return copy.copy_(a);
}

}  // namespace cpu

const Device kCpu = {
    // Only a route table asks for torch's precision here: none was measured with f32 products in bf16.
    [](const ForwardProblem& p) { return cpu::plan_forward(p, cpu::machine_that_runs(p, cpu_routes() != nullptr)); },
    [](const BackwardProblem& p) { return cpu::plan_backward(p, cpu::machine_that_runs(p, true)); },
    &cpu::run_product,
    &cpu::few_columns_backward,
    &cpu::run_activation_pass,
    &cpu::pass_adds_bias,
    &cpu::run_derivative_pass,
    &cpu::gradient_pass,
    [](const GluForwardProblem& p) {
      return cpu::plan_glu_forward(p, cpu::machine_that_runs(p, cpu_routes() != nullptr));
    },
    [](const GluBackwardProblem& p) { return cpu::plan_glu_backward(p, cpu::machine_that_runs(p, true)); },
    [](const BackwardProblem& p) { return cpu::plan_glu_products(p, cpu::machine_that_runs(p, true)); },
    &cpu::run_glu_pass,
    &cpu::run_glu_gradient_pass,
    &cpu::library_operand,
    /*has_masks=*/false,
    /*takes_mask=*/[](const Problem&) { return false; },
    &cpu::route_of_mlp,
    &cpu::run_fused_mlp_forward,
    &cpu::run_fused_mlp_backward,
    &cpu::each_member,
    &cpu::elementwise_loss,
    &cpu::cross_entropy,
    &cpu::linear_cross_entropy,
};

}  // namespace dlk
