// A training step that was decided on, and what the decision rests on.
#pragma once

#include <Python.h>

namespace dlk::python {

void add_training(PyObject* module);

}  // namespace dlk::python
