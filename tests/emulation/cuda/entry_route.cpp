// The routes of CUDA products with C signatures, for ctypes.
#include <cstring>

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
          dlk::cuda::forced_path(),
          dlk::cuda_routes()};
}

}  // namespace

extern "C" {

// A table of one row, or with an empty path none. Tables are never freed.
void use_row(int op, int dtype, int64_t m, int64_t n, int64_t k, int arch, const char* path) {
  dlk::use_cuda_routes(nullptr);
  for (int p = 0; p <= static_cast<int>(dlk::Path::fused_mlp); ++p)
    if (!std::strcmp(dlk::name(static_cast<dlk::Path>(p)), path))
      dlk::use_cuda_routes(new dlk::RouteTable({{static_cast<dlk::Op>(op),
                                                 static_cast<dlk::DType>(dtype),
                                                 {m, n, k},
                                                 arch,
                                                 static_cast<dlk::Path>(p),
                                                 "measured"}}));
}

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
