// Registers the CUDA ops in place of the CPU ops. The last registration is the one that counts.
#include <torch/library.h>

#include "cuda_runtime.h"
#include "ops/linear_act.h"
#include "ops/linear_glu.h"
#include "ops/losses.h"
#include "ops/mlp.h"
#include "ops/on_device.h"
#include "planning/routes.h"

using dlk::kCuda;
using dlk::On;

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("_linear_act_forward", &On<kCuda, dlk::linear_act_forward>::call);
  m.impl("_linear_act_forward_z", &On<kCuda, dlk::linear_act_forward_z>::call);
  m.impl("_linear_act_forward_mask", &On<kCuda, dlk::linear_act_forward_mask>::call);
  m.impl("_linear_act_backward", &On<kCuda, dlk::linear_act_backward>::call);
  m.impl("_linear_glu_forward", &On<kCuda, dlk::linear_glu_forward>::call);
  m.impl("_linear_glu_forward_z", &On<kCuda, dlk::linear_glu_forward_z>::call);
  m.impl("_linear_glu_backward", &On<kCuda, dlk::linear_glu_backward>::call);
  m.impl("_linear_glu_packed_forward", &On<kCuda, dlk::linear_glu_packed_forward>::call);
  m.impl("_linear_glu_packed_forward_z", &On<kCuda, dlk::linear_glu_packed_forward_z>::call);
  m.impl("_linear_glu_packed_backward", &On<kCuda, dlk::linear_glu_packed_backward>::call);
  m.impl("_mlp_forward", &On<kCuda, dlk::mlp_forward>::call);
  m.impl("_mlp_backward", &On<kCuda, dlk::mlp_backward>::call);
  m.impl("_mse_loss_forward", &On<kCuda, dlk::mse_loss_forward>::call);
  m.impl("_gaussian_nll_loss_forward", &On<kCuda, dlk::gaussian_nll_loss_forward>::call);
  m.impl("_cross_entropy_forward", &On<kCuda, dlk::cross_entropy_forward>::call);
  m.impl("_linear_cross_entropy_forward", &On<kCuda, dlk::linear_cross_entropy_forward>::call);
}

extern "C" {

// Return the number of kernels launched so far.
int64_t launches() { return cuda_emulation::launches; }

// Let chains of m rows and these features go these ways, as rows of a route table; without features none. Tables are never
// freed.
void use_mlp_ways(int forward_fused, int backward_fused, int dtype, int64_t m, const int64_t* features, int count) {
  std::vector<dlk::MlpRow> rows;
  for (const auto& [direction, fused] :
       {std::pair{dlk::Direction::forward, forward_fused}, std::pair{dlk::Direction::backward, backward_fused}})
    rows.push_back(
        {direction, static_cast<dlk::DType>(dtype), m, {features, features + count}, 0, fused != 0, "a row", 0});
  dlk::use_cuda_routes(count ? new dlk::RouteTable({}, rows) : nullptr);
}

}  // extern "C"
