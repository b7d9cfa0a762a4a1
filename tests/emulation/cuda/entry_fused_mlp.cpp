// The fused MLP kernels with C signatures, for ctypes. pretend_device sets the properties of the device that they see; a
// GPU has its own.
#include "kernels/cuda/kernels.h"
#include "run.h"
#ifndef __CUDACC__
#include "cuda_runtime.h"
#endif

extern "C" {

#ifndef __CUDACC__
void pretend_device(size_t shared_per_block, int sms) {
  cuda_emulation::device.most_shared = static_cast<int>(shared_per_block);
  cuda_emulation::device.processors = sms;
}
// Begin or end a capture; return whether this thread was in the capture's own mode.
int capture(int begin) {
  cuda_emulation::capturing = begin != 0;
  return cuda_emulation::capture_mode == cudaStreamCaptureModeGlobal;
}
#endif

bool fused_mlp_takes(const dlk::FusedMlp* p, int dtype) {
  return dlk::cuda::fused_mlp_takes(*p, static_cast<dlk::DType>(dtype));
}
int fused_mlp_slices(const dlk::FusedMlp* p, int dtype) {
  return dlk::cuda::fused_mlp_slices(*p, static_cast<dlk::DType>(dtype));
}
int64_t fused_mlp_partials(const dlk::FusedMlp* p, int dtype) {
  return dlk::cuda::fused_mlp_partials(*p, static_cast<dlk::DType>(dtype));
}
int fused_mlp_forward(const dlk::FusedMlp* p, int dtype) {
  return run([&] { return dlk::cuda::fused_mlp_forward(*p, static_cast<dlk::DType>(dtype), nullptr); });
}
int fused_mlp_backward(const dlk::FusedMlp* p, int dtype) {
  return run([&] { return dlk::cuda::fused_mlp_backward(*p, static_cast<dlk::DType>(dtype), nullptr); });
}

}  // extern "C"
