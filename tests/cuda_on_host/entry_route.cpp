// The dispatcher with a C signature, for ctypes.
#include "cuda/route.h"

extern "C" const char* route(int op, int64_t m, int64_t n, int64_t k, int dtype, int tf32, int aligned, int in_rows,
                             int arch, int hopper, int chain) {
  const dlk::cuda::Asked asked = {static_cast<dlk::Op>(op),
                                  {m, n, k},
                                  static_cast<dlk::DType>(dtype),
                                  tf32 != 0,
                                  aligned != 0,
                                  in_rows != 0,
                                  arch,
                                  hopper != 0,
                                  chain != 0};
  return dlk::cuda::name(dlk::cuda::route(asked).path);
}
