// A decision of dlkernels.fusion that holds until something that it read changes.
#pragma once

#include <Python.h>

namespace dlk::python {

void add_decided(PyObject* module);

}  // namespace dlk::python
