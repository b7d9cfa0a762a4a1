// The routes of CUDA products with C signatures, for ctypes.
#include "planning/cuda/route.h"

namespace {

dlk::cuda::RouteQuery query_of(int op, int64_t m, int64_t n, int64_t k, int dtype, int tf32, int aligned, int in_rows,
                               int arch, int hopper, int narrow) {
  return {static_cast<dlk::Op>(op),
          {m, n, k},
          static_cast<dlk::DType>(dtype),
          tf32 != 0,
          aligned != 0,
          in_rows != 0,
          arch,
          hopper != 0,
          narrow != 0,
          dlk::cuda::forced_path()};
}

}  // namespace

extern "C" {

const char* route(int op, int64_t m, int64_t n, int64_t k, int dtype, int tf32, int aligned, int in_rows, int arch,
                  int hopper, int narrow) {
  return dlk::name(dlk::cuda::route(query_of(op, m, n, k, dtype, tf32, aligned, in_rows, arch, hopper, narrow)).path);
}

const char* route_why(int op, int64_t m, int64_t n, int64_t k, int dtype, int tf32, int aligned, int in_rows, int arch,
                      int hopper, int narrow) {
  static std::string why;
  const auto query = query_of(op, m, n, k, dtype, tf32, aligned, in_rows, arch, hopper, narrow);
  why = dlk::cuda::explained(dlk::cuda::route(query), query);
  return why.c_str();
}

}  // extern "C"
