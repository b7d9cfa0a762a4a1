#include "python/decided.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "ops/dispatched.h"
#include "ops/mlp.h"
#include "python/objects.h"
#include "python/tensors.h"

namespace dlk::python {
namespace {

// The chain of layers that a module runs, as Python has decided it, and everything that the decision read. A call compares
// all of it with what is there now, and runs the chain if nothing differs. Nothing here keeps a module or a tensor alive.
//
// Pointers to Python objects are references that `owned` holds.

// An object that must be the same as before. Modules, classes and functions are held by a weak reference, so that a new
// object at an old address is not taken for the old one; numbers and strings cannot be, and are kept. There is none for a
// parameter: torch.utils.swap_tensors refuses tensors that have weak references.
struct Same {
  PyObject* object;
  bool weak;

  bool is(PyObject* now) const {
    if (!weak) return now && now == object;
    return now && now != Py_None && now == referent(object);  // None stands for an object that is gone
  }

  // Borrowed; None if it is gone.
  static PyObject* referent(PyObject* weak_reference) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    PyWeakref_GetRef(weak_reference, &found);
    Py_XDECREF(found);  // whoever called us holds it, or it is gone and equals nothing
    return found ? found : Py_None;
#else
    return PyWeakref_GET_OBJECT(weak_reference);
#endif
  }
};

struct Entry {
  PyObject* table;  // a dict, or the name of one of a module's tables; null for the module's own attributes
  PyObject* key;
  Same value;
  bool absent;  // the key must not be there
};

struct Module {
  Same self;
  Same cls;
  bool calls_forward_alone;  // no hooks, and forward is its class's
  std::vector<Entry> entries;
  bool fixed_children;  // _modules has these values in this order
  std::vector<Same> children;
};

// A layer's parameters are looked up at each call. Any that fit may take the place of those that were there before.
struct Layer {
  size_t module;  // its place among the modules
  bool has_bias;
  int64_t in, out;
};

struct State {
  std::vector<Object> owned;
  std::vector<Entry> globals, class_attributes;
  std::vector<PyObject*> empty;  // dicts
  std::vector<Module> modules;   // the first one is the owner
  std::vector<Layer> layers;
  std::vector<int64_t> acts;
  double slope = 0;
  at::ScalarType dtype = at::kFloat;
  c10::Device device = at::kCPU;
  Same plain[2];  // torch.Tensor and torch.nn.Parameter

  // For Python's garbage collector.
  int visit(visitproc visit, void* arg) const {
    for (const Object& held : owned) Py_VISIT(held.ptr());
    return 0;
  }
  void forget() { const State gone = std::exchange(*this, State()); }  // releasing an object may run code of Python
};

using Decided = Holder<State>;

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject* hooks[4] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                        interned("_backward_pre_hooks")};
  PyObject* replaced[3] = {interned("forward"), interned("_compiled_call_impl"), interned("_call_impl")};
  PyObject* modules = interned("_modules");
  PyObject* parameters = interned("_parameters");
  PyObject* weight = interned("weight");
  PyObject* bias = interned("bias");
};

const Names& names() {
  static const Names* made = new Names;
  return *made;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (!found) PyErr_Clear();
  return found;
}

bool holds(const Entry& entry, PyObject* dict) {
  PyObject* now = item(dict, entry.key);
  return entry.absent ? !now : entry.value.is(now);
}

bool same_children(const Module& m, PyObject* dict) {
  PyObject* children = item(dict, names().modules);
  if (!children || !PyDict_CheckExact(children) || PyDict_GET_SIZE(children) != Py_ssize_t(m.children.size()))
    return false;
  Py_ssize_t at = 0;
  PyObject* value = nullptr;
  for (const Same& child : m.children)
    if (!PyDict_Next(children, &at, nullptr, &value) || !child.is(value)) return false;
  return true;
}

using Dicts = c10::SmallVector<PyObject*, 16>;  // of the attributes of each module; the modules hold them

// Return the module's attributes; null if it has changed.
PyObject* unchanged(const Module& m) {
  PyObject* self = Same::referent(m.self.object);
  if (self == Py_None || !m.cls.is(reinterpret_cast<PyObject*>(Py_TYPE(self)))) return nullptr;
  const Object held = Object::steal(PyObject_GenericGetDict(self, nullptr));
  PyObject* dict = held.ptr();
  if (!dict) {
    PyErr_Clear();
    return nullptr;
  }
  if (m.calls_forward_alone) {
    for (PyObject* key : names().hooks) {
      PyObject* hooks = item(dict, key);
      if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks)) return nullptr;
    }
    for (PyObject* key : names().replaced)
      if (item(dict, key)) return nullptr;
  }
  for (const Entry& entry : m.entries) {
    PyObject* table = entry.table ? item(dict, entry.table) : dict;
    if (!table || !holds(entry, table)) return nullptr;
  }
  return !m.fixed_children || same_children(m, dict) ? dict : nullptr;
}

// at::autocast::is_autocast_enabled, whose header includes half of torch.
bool is_autocast_enabled(at::DeviceType device) {
  return !c10::impl::tls_is_dispatch_key_excluded(device == at::kCUDA ? c10::DispatchKey::AutocastCUDA
                                                                      : c10::DispatchKey::AutocastCPU);
}

// Modes of torch under which Python decides at each call.
bool is_special_mode(at::DeviceType device) {
  return at::tracer::impl::is_dispatch_enabled() || at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         is_autocast_enabled(device);
}

const at::Tensor* plain_tensor(const State& s, PyObject* object) {
  PyObject* cls = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (!s.plain[0].is(cls) && !s.plain[1].is(cls)) return nullptr;
  const at::Tensor& t = unpack(object);
  const bool fits =
      t.scalar_type() == s.dtype && t.device() == s.device && t.layout() == at::kStrided && !t.is_nested();
  return fits ? &t : nullptr;
}

bool unchanged(const State& s, Dicts& dicts) {
  for (PyObject* dict : s.empty)
    if (PyDict_GET_SIZE(dict)) return false;
  for (const Entry& entry : s.globals)
    if (!holds(entry, entry.table)) return false;
  for (const Entry& entry : s.class_attributes) {
    const Object now = Object::steal(PyObject_GetAttr(entry.table, entry.key));
    if (!now) PyErr_Clear();
    if (!entry.value.is(now.ptr())) return false;
  }
  for (const Module& m : s.modules) {
    dicts.push_back(unchanged(m));
    if (!dicts.back()) return false;
  }
  return true;
}

// Collects the tensors of all layers; false if one does not fit.
bool read_parameters(const State& s, const Dicts& dicts, std::vector<at::Tensor>& weights, OptionalTensorList& biases,
                     bool& learns) {
  for (const Layer& layer : s.layers) {
    PyObject* parameters = item(dicts[layer.module], names().parameters);
    PyObject *weight = parameters ? item(parameters, names().weight) : nullptr,
             *bias = parameters ? item(parameters, names().bias) : nullptr;
    if (!weight || !bias || (bias != Py_None) != layer.has_bias) return false;
    const at::Tensor* w = plain_tensor(s, weight);
    if (!w || w->dim() != 2 || w->size(0) != layer.out || w->size(1) != layer.in) return false;
    weights.push_back(*w);
    learns = learns || w->requires_grad();
    if (!layer.has_bias) {
      biases.push_back(std::nullopt);
      continue;
    }
    const at::Tensor* b = plain_tensor(s, bias);
    if (!b || b->dim() != 1 || b->size(0) != layer.out) return false;
    biases.push_back(*b);
    learns = learns || b->requires_grad();
  }
  return true;
}

at::Tensor run_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t act,
                     double slope, bool recorded) {
  using Recorded = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, double, bool);
  using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, double);
  static const auto with_gradients = dispatched<Recorded>("dlkernels::_linear_act");
  static const auto forward = dispatched<Forward>("dlkernels::_linear_act_forward");
  // A mask is saved on CUDA alone, and a chain of one layer is decided here on CPU alone.
  return recorded ? with_gradients.call(x, weight, bias, act, slope, false) : forward.call(x, weight, bias, act, slope);
}

at::Tensor run_chain(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, at::IntArrayRef acts,
                     double slope, bool recorded) {
  using Recorded = at::Tensor(const at::Tensor&, at::TensorList, const OptionalTensors&, at::IntArrayRef, double);
  using Forward = std::vector<at::Tensor>(const at::Tensor&, at::TensorList, const OptionalTensors&, at::IntArrayRef,
                                          double, at::IntArrayRef);
  static const auto with_gradients = dispatched<Recorded>("dlkernels::_mlp");
  static const auto forward = dispatched<Forward>("dlkernels::_mlp_forward");
  return recorded ? with_gradients.call(x, weights, biases, acts, slope)
                  : forward.call(x, weights, biases, acts, slope, {})[0];
}

// run(owner, x): the chain's output, or None if anything differs from what was decided.
PyObject* run_if_unchanged(PyObject* object, PyObject* const* args, Py_ssize_t count) {
  const State& s = Decided::of(object);
  TORCH_CHECK_TYPE(count == 2, "Decided.run: expected owner and x, got ", count, " arguments");
  Dicts dicts;
  if (s.modules.empty() || !s.modules[0].self.is(args[0]) || is_special_mode(s.device.type()) || !unchanged(s, dicts))
    Py_RETURN_NONE;
  const at::Tensor* x = plain_tensor(s, args[1]);
  if (!x || x->dim() < 1 || x->size(-1) != s.layers[0].in) Py_RETURN_NONE;
  std::vector<at::Tensor> weights;
  OptionalTensorList biases;
  bool learns = x->requires_grad();
  if (!read_parameters(s, dicts, weights, biases, learns)) Py_RETURN_NONE;
  at::Tensor y;
  {
    const Unlocked no_gil;
    const bool recorded = learns && c10::GradMode::is_enabled();
    y = weights.size() == 1 ? run_layer(*x, weights[0], get(biases, 0), s.acts[0], s.slope, recorded)
                            : run_chain(*x, weights, biases, s.acts, s.slope, recorded);
  }
  return wrap(y);
}

PyObject* run(PyObject* object, PyObject* const* args, Py_ssize_t count) {
  return with_torch_errors([=] { return run_if_unchanged(object, args, count); });
}

PyObject* activations(PyObject* object, PyObject*) {
  const State& s = Decided::of(object);
  PyObject* codes = PyTuple_New(static_cast<Py_ssize_t>(s.acts.size()));
  for (size_t i = 0; codes && i < s.acts.size(); ++i) PyTuple_SET_ITEM(codes, i, PyLong_FromLongLong(s.acts[i]));
  return codes;
}

// ---- from Python's lists ---------------------------------------------------------------------------------------------

PyObject* own(State& s, PyObject* object) {
  s.owned.push_back(Object::borrow(object));
  return object;
}

Same same(State& s, PyObject* object) {
  if (PyObject* weak = PyWeakref_NewRef(object, nullptr)) {
    s.owned.push_back(Object::steal(weak));
    return {weak, true};
  }
  PyErr_Clear();
  return {own(s, object), false};
}

Same weakly(State& s, PyObject* object) {
  const Same made = same(s, object);
  if (!made.weak) throw TypeError("Decided: expected an object that takes weak references");
  return made;
}

// A borrowed value of a dict that must have it.
PyObject* entry_of(PyObject* dict, const char* key) {
  PyObject* found = PyDict_Check(dict) ? PyDict_GetItemString(dict, key) : nullptr;
  if (!found) throw TypeError("Decided: expected a dict with the key " + std::string(key));
  return found;
}

// A row (table, key, value, ...); `missing` as the value stands for a key that must be absent.
Entry entry(State& s, PyObject* row, PyObject* missing) {
  const Items parts(row);
  const bool absent = parts[2] == missing;
  PyObject* table = parts[0] == Py_None ? nullptr : own(s, parts[0]);
  return {table, own(s, parts[1]), absent ? Same{nullptr, false} : same(s, parts[2]), absent};
}

void fill(State& s, PyObject* read) {
  auto rows = [&](const char* key) { return Items(entry_of(read, key)); };
  PyObject* missing = entry_of(read, "missing");
  for (PyObject* dict : rows("empty")) {
    if (!PyDict_Check(dict)) throw TypeError("Decided: expected dicts in `empty`");
    s.empty.push_back(own(s, dict));
  }
  for (PyObject* row : rows("globals")) s.globals.push_back(entry(s, row, missing));
  for (PyObject* row : rows("class_attributes")) s.class_attributes.push_back(entry(s, row, missing));
  for (PyObject* row : rows("modules")) {  // module, calls forward alone, entries, children or None
    const Items parts(row);
    Module m{weakly(s, parts[0]),
             weakly(s, reinterpret_cast<PyObject*>(Py_TYPE(parts[0]))),
             from_python<bool>(parts[1]),
             {},
             false,
             {}};
    for (PyObject* e : Items(parts[2])) m.entries.push_back(entry(s, e, missing));
    m.fixed_children = parts[3] != Py_None;
    if (m.fixed_children)
      for (PyObject* child : Items(parts[3])) m.children.push_back(same(s, child));
    s.modules.push_back(std::move(m));
  }
  const Items plain = rows("plain");
  for (int i = 0; i < 2; ++i) s.plain[i] = same(s, plain[i]);
  for (PyObject* row : rows("layers")) {  // module, code of the activation
    const Items parts(row);
    const auto at =
        std::find_if(s.modules.begin(), s.modules.end(), [&](const Module& m) { return m.self.is(parts[0]); });
    if (at == s.modules.end()) throw std::invalid_argument("Decided: expected the layers among the modules");
    const Object parameters = made(PyObject_GetAttr(parts[0], names().parameters));
    const at::Tensor& w = unpack(entry_of(parameters.ptr(), "weight"));
    const bool has_bias = entry_of(parameters.ptr(), "bias") != Py_None;
    s.layers.push_back({static_cast<size_t>(at - s.modules.begin()), has_bias, w.size(1), w.size(0)});
    s.acts.push_back(from_python<int64_t>(parts[1]));
    s.dtype = w.scalar_type(), s.device = w.device();
  }
  s.slope = from_python<double>(entry_of(read, "slope"));
  if (s.modules.empty() || s.layers.empty()) throw std::invalid_argument("Decided: expected an owner and a layer");
}

PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* read = nullptr;
  if (!PyArg_ParseTuple(args, "O!:Decided", &PyDict_Type, &read)) return nullptr;
  return Decided::create(type, [&] {
    auto state = std::make_unique<State>();
    fill(*state, read);
    return state.release();
  });
}

PyMethodDef kMethods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run)), METH_FASTCALL,
     "run(owner, x): the output of the chain; None if anything that the decision read has changed."},
    {"activations", &activations, METH_NOARGS, "The code of each layer's activation."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_decided(PyObject* module) {
  add_object(module, "Decided", class_of<State>("dlkernels._C.Decided", &create, kMethods));
}

}  // namespace dlk::python
