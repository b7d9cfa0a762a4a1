// Calls that go straight to the dispatcher: torch.ops reads a schema and boxes every argument, which at 1x8→8 takes as long as
// the op. Python makes a call itself wherever it is not an ordinary one.
#pragma once

#include <pybind11/pybind11.h>

namespace dlk::python {

void add_calls(pybind11::module_&);

}  // namespace dlk::python
