// The plans that would run, as Python sees them.
#pragma once

#include <pybind11/pybind11.h>

namespace dlk::python {

void add_explain(pybind11::module_&);

}  // namespace dlk::python
