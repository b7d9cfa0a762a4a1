// The route tables, as Python hands them over (dlkernels/routing.py).
#pragma once

#include <pybind11/pybind11.h>

namespace dlk::python {

void add_routes(pybind11::module_&);

}  // namespace dlk::python
