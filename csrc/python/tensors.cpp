#include "python/tensors.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace dlk::python {
namespace {

bool is_empty(PyObject* hooks) { return !hooks || hooks == Py_None || PyObject_Size(hooks) == 0; }

}  // namespace

const at::Tensor& unpack(PyObject* tensor) { return THPVariable_Unpack(tensor); }

PyObject* wrap(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }

bool is_exactly_tensor(PyObject* object) { return THPVariable_CheckExact(object); }

bool has_hooks(PyObject* tensor) {
  const auto* variable = reinterpret_cast<const THPVariable*>(tensor);
  return !is_empty(variable->backward_hooks) || !is_empty(variable->post_accumulate_grad_hooks);
}

PyObject* with_torch_errors(PyObject* (*call)(const void*), const void* f) {
  HANDLE_TH_ERRORS
  return call(f);
  END_HANDLE_TH_ERRORS
}

}  // namespace dlk::python
