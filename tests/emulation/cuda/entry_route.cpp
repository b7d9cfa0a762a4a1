// The dispatcher with C signatures, for ctypes.
#include "planning/cuda/route.h"

namespace {

dlk::cuda::Route route_of(int op, int64_t m, int64_t n, int64_t k, int dtype, int tf32, int aligned, int in_rows,
                          int arch, int hopper, int chain) {
  return dlk::cuda::route({static_cast<dlk::Op>(op),
                           {m, n, k},
                           static_cast<dlk::DType>(dtype),
                           tf32 != 0,
                           aligned != 0,
                           in_rows != 0,
                           arch,
                           hopper != 0,
                           chain != 0});
}

}  // namespace

extern "C" {

const char* route(int op, int64_t m, int64_t n, int64_t k, int dtype, int tf32, int aligned, int in_rows, int arch,
                  int hopper, int chain) {
  return dlk::cuda::name(route_of(op, m, n, k, dtype, tf32, aligned, in_rows, arch, hopper, chain).path);
}

const char* route_why(int op, int64_t m, int64_t n, int64_t k, int dtype, int tf32, int aligned, int in_rows, int arch,
                      int hopper, int chain) {
  static std::string why;
  why = dlk::cuda::explained(route_of(op, m, n, k, dtype, tf32, aligned, in_rows, arch, hopper, chain));
  return why.c_str();
}

}  // extern "C"
