// Where an entry point runs its kernels: on the host, or, compiled by nvcc, on the GPU that is here.
#pragma once

#ifdef __CUDACC__
#include "guarded_on_device.h"
using cuda_on_device::run;
#else
template <class Launch>
int run(Launch&& launch) {
  return launch();
}
#endif
