// The plans that would run, as Python sees them.
#pragma once

#include <Python.h>

namespace dlk::python {

void add_explain(PyObject* module);

}  // namespace dlk::python
