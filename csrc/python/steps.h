// Calls that follow one another, and what was decided for them (dlkernels.fusion.steps).
#pragma once

#include <pybind11/pybind11.h>

namespace dlk::python {

void add_steps(pybind11::module_& m);

}  // namespace dlk::python
