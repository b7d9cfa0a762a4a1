// The chain kernels with C signatures, for ctypes, and the device they are to believe they run on.
#include "kernels/cuda/kernels.h"
#include "cuda_runtime.h"

extern "C" {

void pretend_device(size_t shared_per_block, int sms) {
  cuda_emulation::device.most_shared = static_cast<int>(shared_per_block);
  cuda_emulation::device.processors = sms;
}

bool chain_takes(const dlk::Chain* p, int dtype) { return dlk::cuda::chain_takes(*p, static_cast<dlk::DType>(dtype)); }
int chain_slices(const dlk::Chain* p, int dtype) { return dlk::cuda::chain_slices(*p, static_cast<dlk::DType>(dtype)); }
int64_t chain_partials(const dlk::Chain* p, int dtype) {
  return dlk::cuda::chain_partials(*p, static_cast<dlk::DType>(dtype));
}
int chain_forward(const dlk::Chain* p, int dtype) {
  return dlk::cuda::chain_forward(*p, static_cast<dlk::DType>(dtype), nullptr);
}
int chain_backward(const dlk::Chain* p, int dtype) {
  return dlk::cuda::chain_backward(*p, static_cast<dlk::DType>(dtype), nullptr);
}

}  // extern "C"
