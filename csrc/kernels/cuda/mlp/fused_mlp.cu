// The launchers of fused_mlp_forward.cuh, fused_mlp_backward.cuh and layer_backward.cuh: how many layers one launch
// has, how many rows a block, and how many blocks there are.
//
// The backward of several layers keeps the weight and the f32 sums of dweight of each layer in shared memory. A layer
// of 64 features in bf16 needs 9 + 16 KiB. Seven such layers fit in the 227 KiB of an H100, so they are one launch,
// which reads every saved activation once. A layer of 128 features needs 34 + 64 KiB. Then every layer is a launch of
// its own, with its sums in registers; it still makes dx, dweight and dbias from one read of its dz and its input. A
// launch begins at the last layer that is left, and takes layers below it for as long as they fit.
#include "kernels/cuda/mlp/fused_mlp_backward.cuh"
#include "kernels/cuda/mlp/fused_mlp_forward.cuh"
#include "kernels/cuda/mlp/layer_backward.cuh"

#include <algorithm>

namespace dlk::cuda {
namespace {

struct Device {
  int64_t shared;  // the most bytes of shared memory of a block
  int64_t sms;
};

// Return the current device, or one on which nothing fits if it does not answer.
Device this_device() {
  DeviceFacts facts;
  if (device_facts(&facts) != cudaSuccess) return {0, 0};
  return {facts.most_shared, facts.processors};
}

// Return whether two blocks of so many bytes fit on an SM. An SM has 1 KiB more than a block may take, and reserves 1
// KiB for each block.
bool two_fit(const Device& device, int64_t bytes) { return 2 * (bytes + 1024) <= device.shared + 1024; }

// Return the most features of layers begin ... end.
int widest(const FusedMlp& p, int begin, int end) {
  int64_t features = p.layer[begin].k;
  for (int l = begin; l < end; ++l) features = std::max(features, p.layer[l].n);
  return static_cast<int>(features);
}

struct Launch {
  int begin, end;  // layers
  int threads;
  int block_rows;  // backward
  int stages;      // backward: of layer_backward_kernel, or 0: fused_mlp_backward_kernel
  int64_t bytes;   // of shared memory
};

// Plan the forward; return false if it does not fit. An SM gets two blocks of 8 warps if they fit, otherwise one block
// of up to 16 warps. Fewer than 4 warps are too few to hide the latency of memory. Few rows are spread over the SMs in
// smaller blocks.
template <class T>
bool plan_forward(const FusedMlp& p, const Device& device, Launch* plan) {
  constexpr int kFewest = 4;
  int64_t weights = 0;
  for (int l = 0; l < p.layers; ++l)
    weights += forward_bytes<T>(static_cast<int>(p.layer[l].n), static_cast<int>(p.layer[l].k));
  const int64_t per_warp = 2 * strip_bytes<T>(pitch_of<T>(widest(p, 0, p.layers)));
  int64_t warps = std::min<int64_t>(kForwardWarps, (device.shared - weights) / per_warp);
  if (device.shared < weights || warps < kFewest) return false;
  if (two_fit(device, weights + kForwardWarps / 2 * per_warp)) warps = kForwardWarps / 2;
  const int64_t strips_per_sm = ceil_div(ceil_div(p.rows, kStrip), device.sms);
  warps = std::min(warps, std::max<int64_t>(kFewest, strips_per_sm));
  *plan = {0, p.layers, static_cast<int>(warps) * 32, 0, 0, weights + warps * per_warp};
  return true;
}

// Plan layer_backward_kernel for layer l, with 3 stages or 2; return false if it does not fit. Among the block sizes
// that fit it chooses the one with which the busiest SM is done first, if a block costs the time of its rows and of 16
// more.
template <class T>
bool plan_layer(const FusedMlp& p, int l, const Device& device, Launch* plan) {
  const int n = static_cast<int>(p.layer[l].n), k = static_cast<int>(p.layer[l].k);
  constexpr int kLeast = LayerBackward<T>::Dgrad::kRows;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int rows = std::max(n, k) > kFusedMlpFeatures / 2 ? 64 : 128; rows >= kLeast; rows -= kLeast) {
    const bool three = LayerBackward<T>::bytes(n, k, rows, 3) <= device.shared;
    const int64_t bytes = LayerBackward<T>::bytes(n, k, rows, three ? 3 : 2);
    if (bytes > device.shared) continue;
    const int64_t time = ceil_div(ceil_div(p.rows, rows), device.sms) * (rows + 16);
    if (time >= best) continue;
    best = time;
    *plan = {l, l + 1, kLayerThreads, rows, three ? 3 : 2, bytes};
  }
  return best < std::numeric_limits<int64_t>::max();
}

// Plan fused_mlp_backward_kernel for layers begin ... end; return false if it does not fit. A block has as many rows as
// fit, up to 128 if every SM still gets two blocks, otherwise up to 64.
template <class T>
bool plan_layers(const FusedMlp& p, int begin, int end, const Device& device, Launch* plan) {
  int64_t layers = 0;
  for (int l = begin; l < end; ++l)
    layers += BackwardLayer<T>::bytes(static_cast<int>(p.layer[l].n), static_cast<int>(p.layer[l].k));
  const int64_t per_row = int64_t{3} * pitch_of<T>(widest(p, begin, end)) * static_cast<int64_t>(sizeof(T));
  int rows = p.rows >= 2 * 128 * device.sms ? 128 : 64;
  while (rows > kStrip && layers + rows * per_row > device.shared) rows /= 2;
  *plan = {begin, end, kBackwardThreads, rows, 0, layers + rows * per_row};
  return plan->bytes <= device.shared;
}

struct BackwardPlan {
  int launches;
  Launch launch[kFusedMlpLayers];  // from the top
  int slices;
};

template <class T>
bool plan_backward(const FusedMlp& p, const Device& device, BackwardPlan* plan) {
  *plan = {};
  bool two_per_sm = true;
  int64_t blocks = 1;
  for (int end = p.layers; end > 0;) {
    Launch& part = plan->launch[plan->launches++];
    if (!plan_layer<T>(p, end - 1, device, &part) && !plan_layers<T>(p, end - 1, end, device, &part)) return false;
    Launch longer;
    while (part.begin > 0 && plan_layers<T>(p, part.begin - 1, end, device, &longer) && longer.block_rows >= 64)
      part = longer;
    two_per_sm = two_per_sm && part.stages == 0 && two_fit(device, part.bytes);
    blocks = std::max(blocks, ceil_div(p.rows, part.block_rows));
    end = part.begin;
  }
  for (int i = 0; two_per_sm && i < plan->launches; ++i) plan->launch[i].threads = kBackwardThreads / 2;
  // A slice has at most kMostRows rows, so that the error of its sums does not grow with the batch.
  constexpr int kMostRows = 8192;
  plan->slices =
      static_cast<int>(std::max(std::min(blocks, device.sms * (two_per_sm ? 2 : 1)), ceil_div(p.rows, kMostRows)));
  return true;
}

template <class F>
auto with_fused_mlp_dtype(DType dtype, F&& f) -> decltype(f(0.0f)) {
  switch (dtype) {
    case DType::f32: return f(0.0f);
    case DType::bf16: return f(Bf16{});
    case DType::f16: return f(F16{});
    case DType::f64: break;
  }
  return {};
}

BackwardPlan plan_backward(const FusedMlp& p, DType dtype) {
  BackwardPlan plan{};
  with_fused_mlp_dtype(dtype, [&](auto t) { return plan_backward<decltype(t)>(p, this_device(), &plan); });
  return plan;
}

int64_t parameters_of(const FusedMlp& p) {
  int64_t sum = 0;
  for (int l = 0; l < p.layers; ++l) sum += p.layer[l].n * p.layer[l].k + p.layer[l].n;
  return sum;
}

// Return the f32 elements of one handoff buffer: dz of a layer, [rows, n] in the dtype of the call, from one launch of
// backward to the next. Two such buffers follow the partials and are used in turn.
int64_t handoff_floats(const FusedMlp& p, DType dtype, const BackwardPlan& plan) {
  int64_t features = 0;
  for (int i = 1; i < plan.launches; ++i) features = std::max(features, p.layer[plan.launch[i].end - 1].n);
  return ceil_div(p.rows * features, dtype == DType::f32 ? 1 : 2);
}
// Return f32 elements rounded up to packs of 16 bytes.
int64_t whole_packs(int64_t floats) { return ceil_div(floats, 4) * 4; }

FusedMlpPass pass_of(const FusedMlp& p) {
  FusedMlpPass pass{};
  for (int l = 0; l < p.layers; ++l) {
    pass.layer[l] = p.layer[l];
    const FusedMlpLayer& layer = p.layer[l];
    const Act kind = layer.act.kind;
    pass.saved[l] = kind == Act::none ? nullptr : layer.mask ? layer.mask : saves_output(kind) ? layer.h : layer.z;
  }
  pass.saved_is_mask = p.layers == 1 && p.layer[0].mask;
  pass.rows = p.rows;
  pass.x = p.x;
  return pass;
}

template <class T>
cudaError_t forward(const FusedMlp& p, cudaStream_t stream) {
  const Device device = this_device();
  Launch plan;
  if (!plan_forward<T>(p, device, &plan)) return cudaErrorInvalidValue;
  FusedMlpPass pass = pass_of(p);
  pass.begin = plan.begin, pass.end = plan.end;
  const int features = widest(p, 0, p.layers);
  pass.pitch = pitch_of<T>(features);
  const int64_t blocks = ceil_div(p.rows, plan.threads / 32 * kStrip);
  const dim3 grid(static_cast<unsigned>(std::min(blocks, device.sms * (two_fit(device, plan.bytes) ? 2 : 1))));
  const auto shared = static_cast<size_t>(plan.bytes);
  if (features <= kFusedMlpFeatures / 2)
    return launch(fused_mlp_forward_kernel<T, kFusedMlpFeatures / 2 / kUnitColumns>, grid, plan.threads, shared, stream,
                  pass);
  return launch(fused_mlp_forward_kernel<T, kFusedMlpFeatures / kUnitColumns>, grid, plan.threads, shared, stream,
                pass);
}

template <class T>
cudaError_t backward(const FusedMlp& p, DType dtype, cudaStream_t stream) {
  BackwardPlan plan;
  if (!plan_backward<T>(p, this_device(), &plan) || p.slices != plan.slices) return cudaErrorInvalidValue;
  // no layer below `deepest` has a gradient that is asked for
  int deepest = 0;
  while (!p.dx && deepest < p.layers && !p.layer[deepest].dweight && !p.layer[deepest].dbias) ++deepest;
  if (deepest == p.layers) return cudaSuccess;

  FusedMlpPass pass = pass_of(p);
  auto* partials = static_cast<float*>(p.partials);
  pass.slices = p.slices;
  bool sums = false;
  int64_t most = 0;  // the most elements of a parameter gradient
  for (int l = 0; l < p.layers; ++l) {
    const int64_t n = p.layer[l].n, parameters = n * p.layer[l].k;
    pass.partials[l] = partials;
    partials += p.slices * (parameters + n);
    sums = sums || p.layer[l].dweight || p.layer[l].dbias;
    most = std::max(most, parameters);
  }
  float* handoff[2];
  handoff[0] = static_cast<float*>(p.partials) + whole_packs(p.slices * parameters_of(p));
  handoff[1] = handoff[0] + whole_packs(handoff_floats(p, dtype, plan));

  pass.incoming = p.grad_y;
  for (int i = 0; i < plan.launches && plan.launch[i].end > deepest; ++i) {
    const Launch& part = plan.launch[i];
    pass.begin = std::max(part.begin, deepest), pass.end = part.end;
    pass.outgoing = pass.begin > deepest ? handoff[i % 2] : pass.begin == 0 ? p.dx : nullptr;
    const int features = widest(p, part.begin, part.end);
    pass.pitch = part.stages ? LayerBackward<T>::pitch(features) : pitch_of<T>(features);
    pass.block_rows = part.block_rows;
    pass.stages = part.stages;
    if (pass.saved_is_mask && !part.stages) return cudaErrorInvalidValue;  // of a device with almost no shared memory
    const cudaError_t status =
        launch(part.stages ? layer_backward_kernel<T> : fused_mlp_backward_kernel<T>,
               dim3(static_cast<unsigned>(p.slices)), part.threads, static_cast<size_t>(part.bytes), stream, pass);
    if (status != cudaSuccess) return status;
    pass.incoming = {pass.outgoing, p.layer[part.begin].k, 1};
    pass.incoming_is_dz = true;
  }
  if (!sums) return cudaSuccess;
  const dim3 grid(grid_of(ceil_div(most, kSumOutputs)), 1, static_cast<unsigned>(2 * p.layers));
  return launch(fused_mlp_sum_kernel<T>, grid, kSumOutputs * kSumSharers, 0, stream, pass);
}

bool masks_fit(const FusedMlp& p, DType dtype) {
  for (int l = 0; l < p.layers; ++l)
    if (p.layer[l].mask && !fills_mask_bytes(dtype, p.layer[l].n, {})) return false;
  return true;
}

}  // namespace

bool fused_mlp_takes(const FusedMlp& p, DType dtype) {
  if (p.layers < 1 || p.layers > kFusedMlpLayers) return false;
  for (int l = 0; l < p.layers; ++l)
    if (std::min(p.layer[l].n, p.layer[l].k) < 1 || std::max(p.layer[l].n, p.layer[l].k) > kFusedMlpFeatures)
      return false;
  return with_fused_mlp_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const Device device = this_device();
    Launch forward;
    BackwardPlan backward;
    return plan_forward<T>(p, device, &forward) && plan_backward<T>(p, device, &backward);
  });
}

int fused_mlp_slices(const FusedMlp& p, DType dtype) { return plan_backward(p, dtype).slices; }

int64_t fused_mlp_partials(const FusedMlp& p, DType dtype) {
  const BackwardPlan plan = plan_backward(p, dtype);
  return whole_packs(plan.slices * parameters_of(p)) +
         std::min(2, plan.launches - 1) * whole_packs(handoff_floats(p, dtype, plan));
}

cudaError_t fused_mlp_forward(const FusedMlp& p, DType dtype, cudaStream_t stream) {
  if (!fused_mlp_takes(p, dtype) || !masks_fit(p, dtype)) return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  return with_fused_mlp_dtype(dtype, [&](auto t) { return forward<decltype(t)>(p, stream); });
}

cudaError_t fused_mlp_backward(const FusedMlp& p, DType dtype, cudaStream_t stream) {
  if (!fused_mlp_takes(p, dtype) || !masks_fit(p, dtype)) return cudaErrorInvalidValue;
  for (int l = 0; p.layers > 1 && l < p.layers; ++l)
    if (p.layer[l].mask) return cudaErrorInvalidValue;
  return with_fused_mlp_dtype(dtype, [&](auto t) { return backward<decltype(t)>(p, dtype, stream); });
}

}  // namespace dlk::cuda
