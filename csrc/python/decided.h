// A decision of dlkernels.fusion that holds until something that it read changes.
#pragma once

#include <pybind11/pybind11.h>

namespace dlk::python {

void add_decided(pybind11::module_& m);

}  // namespace dlk::python
