// Names that Python uses, as values.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kernels/params.h"

namespace dlk::python {

inline DType dtype_named(const std::string& dtype) {
  const char* const dtypes[] = {"float64", "float32", "bfloat16", "float16"};
  for (int index = 0; index < 4; ++index)
    if (dtype == dtypes[index]) return static_cast<DType>(index);
  throw pybind11::type_error("expected float64, float32, bfloat16 or float16, got " + dtype);
}

}  // namespace dlk::python
