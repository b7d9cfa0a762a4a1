#include "python/calls.h"

#include <c10/core/GradMode.h>

#include <algorithm>

#include "ops/autograd/losses.h"
#include "ops/dispatched.h"
#include "python/run.h"
#include "python/tensors.h"

namespace dlk::python {
namespace {

// Python hands these over: the place of the level of forward-mode AD, and the codes of activations and reductions.
struct Known {
  PyObject* forward_ad = nullptr;  // the dict of the module
  PyObject* activations = nullptr;
  PyObject* reductions = nullptr;
  PyObject* level = PyUnicode_InternFromString("_current_level");
};

Known& known() {
  static Known* made = new Known;
  return *made;
}

bool is_forward_mode() {
  PyObject* level = PyDict_GetItemWithError(known().forward_ad, known().level);
  return !level || PyLong_AsLong(level) != -1;
}

// Return true if a call of this many arguments may be an ordinary one in the present context.
bool is_ordinary(Py_ssize_t count, Py_ssize_t expected) {
  return count == expected && known().forward_ad && !is_special_mode(at::kCPU) && !is_forward_mode();
}

const at::Tensor* dense_on_cpu(PyObject* object) {
  if (!is_exactly_tensor(object)) return nullptr;
  const at::Tensor& t = unpack(object);
  return t.is_cpu() && t.layout() == at::kStrided && !t.is_nested() ? &t : nullptr;
}

// The code of a name in the dict, or -1.
int64_t code_of(PyObject* codes, PyObject* name) {
  PyObject* code = PyUnicode_CheckExact(name) ? PyDict_GetItemWithError(codes, name) : nullptr;
  return code ? PyLong_AsLongLong(code) : -1;
}

// linear_act(x, weight, bias, activation, negative_slope): y, or None where it is no ordinary call.
PyObject* linear_act(PyObject* const* args, Py_ssize_t count) {
  if (!is_ordinary(count, 5)) Py_RETURN_NONE;
  const at::Tensor *x = dense_on_cpu(args[0]), *weight = dense_on_cpu(args[1]);
  const at::Tensor* bias = args[2] == Py_None ? nullptr : dense_on_cpu(args[2]);
  const int64_t act = code_of(known().activations, args[3]);
  if (!x || !weight || (!bias && args[2] != Py_None) || act < 0 || !PyFloat_CheckExact(args[4])) Py_RETURN_NONE;
  const double slope = PyFloat_AS_DOUBLE(args[4]);
  const bool learns = x->requires_grad() || weight->requires_grad() || (bias && bias->requires_grad());
  at::Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = run_layer(*x, *weight, bias ? OptionalTensor(*bias) : std::nullopt, act, slope,
                  learns && c10::GradMode::is_enabled());
  }
  return wrap(y);
}

// The items of a list or a tuple, or null with a count of -1.
struct Items {
  PyObject** at = nullptr;
  Py_ssize_t count = -1;

  explicit Items(PyObject* object) {
    if (PyList_CheckExact(object) || PyTuple_CheckExact(object))
      at = PySequence_Fast_ITEMS(object), count = PySequence_Fast_GET_SIZE(object);
  }
};

// The codes of the activations between `layers` layers: one name for all, or one for each; and the last one's. Empty if they are
// anything else.
std::vector<int64_t> codes_of(PyObject* names, PyObject* last, Py_ssize_t layers) {
  std::vector<int64_t> codes;
  const Items each(names);
  if (each.count < 0 && !PyUnicode_CheckExact(names)) return {};
  if (each.count < 0)
    codes.assign(layers - 1, code_of(known().activations, names));
  else
    for (Py_ssize_t i = 0; i < each.count; ++i) codes.push_back(code_of(known().activations, each.at[i]));
  codes.push_back(code_of(known().activations, last));
  const bool all_known = std::all_of(codes.begin(), codes.end(), [](int64_t code) { return code >= 0; });
  return all_known && static_cast<Py_ssize_t>(codes.size()) == layers ? codes : std::vector<int64_t>();
}

// mlp(x, weights, biases, activation, last_activation, negative_slope): the chain's output, or None. weights are of single
// layers, not of an ensemble.
PyObject* mlp(PyObject* const* args, Py_ssize_t count) {
  if (!is_ordinary(count, 6)) Py_RETURN_NONE;
  const at::Tensor* x = dense_on_cpu(args[0]);
  const Items weights(args[1]), biases(args[2]);
  const bool biased = args[2] != Py_None;
  if (!x || weights.count < 1 || (biased && biases.count != weights.count) || !PyFloat_CheckExact(args[5]))
    Py_RETURN_NONE;
  const std::vector<int64_t> acts = codes_of(args[3], args[4], weights.count);
  if (acts.empty()) Py_RETURN_NONE;
  std::vector<at::Tensor> of_layers;
  OptionalTensorList bias_of_layers;
  bool learns = x->requires_grad();
  for (Py_ssize_t i = 0; i < weights.count; ++i) {
    const at::Tensor* weight = dense_on_cpu(weights.at[i]);
    if (!weight || weight->dim() != 2) Py_RETURN_NONE;
    of_layers.push_back(*weight);
    learns = learns || weight->requires_grad();
    if (!biased || biases.at[i] == Py_None) {
      bias_of_layers.push_back(std::nullopt);
      continue;
    }
    const at::Tensor* bias = dense_on_cpu(biases.at[i]);
    if (!bias) Py_RETURN_NONE;
    bias_of_layers.push_back(*bias);
    learns = learns || bias->requires_grad();
  }
  const double slope = PyFloat_AS_DOUBLE(args[5]);
  at::Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = run_chain(*x, of_layers, bias_of_layers, acts, slope, learns && c10::GradMode::is_enabled());
  }
  return wrap(y);
}

// mse_loss(input, target, reduction): the loss, or None.
PyObject* mse_loss(PyObject* const* args, Py_ssize_t count) {
  if (!is_ordinary(count, 3)) Py_RETURN_NONE;
  const at::Tensor *input = dense_on_cpu(args[0]), *target = dense_on_cpu(args[1]);
  const int64_t reduction = code_of(known().reductions, args[2]);
  if (!input || !target || reduction < 0 || input->scalar_type() != target->scalar_type() ||
      input->sizes() != target->sizes())
    Py_RETURN_NONE;
  const bool learns = (input->requires_grad() || target->requires_grad()) && c10::GradMode::is_enabled();
  at::Tensor loss;
  {
    const pybind11::gil_scoped_release no_gil;
    using Recorded = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t);
    static const auto with_gradients = dispatched<Recorded>("dlkernels::_mse_loss");
    loss = learns ? with_gradients.call(*input, *target, reduction)
                  : std::get<0>(call_mse_loss_forward(*input, *target, reduction, false));
  }
  return wrap(loss);
}

// cross_entropy(input, target, ignore_index, reduction, label_smoothing): the loss, or None. target holds class indices.
PyObject* cross_entropy(PyObject* const* args, Py_ssize_t count) {
  if (!is_ordinary(count, 5)) Py_RETURN_NONE;
  const at::Tensor *input = dense_on_cpu(args[0]), *target = dense_on_cpu(args[1]);
  const int64_t reduction = code_of(known().reductions, args[3]);
  if (!input || !target || reduction < 0 || target->scalar_type() != at::kLong || !PyLong_CheckExact(args[2]) ||
      !PyFloat_CheckExact(args[4]))
    Py_RETURN_NONE;
  const int64_t ignore_index = PyLong_AsLongLong(args[2]);
  if (ignore_index == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const double label_smoothing = PyFloat_AS_DOUBLE(args[4]);
  const bool learns = input->requires_grad() && c10::GradMode::is_enabled();
  at::Tensor loss;
  {
    const pybind11::gil_scoped_release no_gil;
    using Recorded = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, int64_t, double);
    static const auto with_gradients = dispatched<Recorded>("dlkernels::_cross_entropy");
    loss = learns ? with_gradients.call(*input, *target, std::nullopt, reduction, ignore_index, label_smoothing)
                  : std::get<0>(call_cross_entropy_forward(*input, *target, std::nullopt, reduction, ignore_index,
                                                           label_smoothing, false, false));
  }
  return wrap(loss);
}

// `call` as a function of Python.
template <PyObject* (*call)(PyObject* const*, Py_ssize_t)>
PyCFunction function() {
  PyObject* (*made)(PyObject*, PyObject* const*, Py_ssize_t) = [](PyObject*, PyObject* const* args, Py_ssize_t count) {
    return with_torch_errors([=] { return call(args, count); });
  };
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(made));
}

PyMethodDef kCalls[] = {
    {"linear_act", function<linear_act>(), METH_FASTCALL,
     "linear_act(x, weight, bias, activation, negative_slope): y; None where it is no ordinary call on CPU."},
    {"mlp", function<mlp>(), METH_FASTCALL,
     "mlp(x, weights, biases, activation, last_activation, negative_slope): the chain's output; None where it is no "
     "ordinary call on CPU."},
    {"mse_loss", function<mse_loss>(), METH_FASTCALL,
     "mse_loss(input, target, reduction): the loss; None where it is no ordinary call on CPU."},
    {"cross_entropy", function<cross_entropy>(), METH_FASTCALL,
     "cross_entropy(input, target, ignore_index, reduction, label_smoothing): the loss of class indices; "
     "None where it is no ordinary call on CPU."},
};

}  // namespace

void add_calls(pybind11::module_& m) {
  for (PyMethodDef& call : kCalls)
    m.add_object(call.ml_name, pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&call, nullptr)));
  m.def(
      "prepare_calls",
      [](const pybind11::dict& forward_ad, const pybind11::dict& activations, const pybind11::dict& reductions) {
        known().forward_ad = forward_ad.inc_ref().ptr();
        known().activations = activations.inc_ref().ptr();
        known().reductions = reductions.inc_ref().ptr();
      },
      pybind11::arg("forward_ad"), pybind11::arg("activations"), pybind11::arg("reductions"),
      "Until this call the calls return None. forward_ad: the dict of the module. The others: codes by name.");
}

}  // namespace dlk::python
