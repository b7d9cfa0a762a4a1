// The route tables, as Python hands them over (dlkernels/routing.py).
#pragma once

#include <Python.h>

namespace dlk::python {

void add_routes(PyObject* module);

}  // namespace dlk::python
