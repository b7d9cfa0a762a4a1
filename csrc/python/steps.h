// What the modules of a container do in turn (dlkernels.fusion.steps).
#pragma once

#include <pybind11/pybind11.h>

namespace dlk::python {

void add_steps(pybind11::module_& m);

}  // namespace dlk::python
