// A training step that was decided on, and what the decision rests on.
#pragma once

#include <pybind11/pybind11.h>

namespace dlk::python {

void add_training(pybind11::module_&);

}  // namespace dlk::python
