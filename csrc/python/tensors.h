// Tensors that Python holds, and torch's errors as Python's. torch's headers for these cost a compiler 8 s and 800 MB, so they
// are included in tensors.cpp alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

namespace dlk::python {

// The tensor of an object that is a torch.Tensor.
const at::Tensor& unpack(PyObject* tensor);

// A new reference to the object of a tensor.
PyObject* wrap(const at::Tensor&);

// Return true for a torch.Tensor or a Parameter, and false for another subclass.
bool is_exactly_tensor(PyObject*);

// Return true if backward calls hooks of the tensor.
bool has_hooks(PyObject* tensor);

PyObject* with_torch_errors(PyObject* (*call)(const void* f), const void* f);

// Return what f returns. If it throws, the error of Python is set, as in torch's own functions, and null is returned.
template <class F>
PyObject* with_torch_errors(const F& f) {
  return with_torch_errors([](const void* object) -> PyObject* { return (*static_cast<const F*>(object))(); }, &f);
}

}  // namespace dlk::python
