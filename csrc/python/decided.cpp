#include "python/decided.h"

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "ops/dispatched.h"
#include "ops/mlp.h"
#include "python/run.h"
#include "python/tensors.h"

namespace dlk::python {
namespace {

// The chain of layers, or the gated layer, that a module runs, as Python has decided it, and everything that the decision
// read. A call compares all of it with what is there now, and runs the layers if nothing differs. Nothing here keeps a
// module or a tensor alive.
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

struct Parameter {
  size_t module;   // the place of its module among the modules
  PyObject* name;  // null where none is given
};

// A layer's parameters are looked up at each call. Any that fit may take the place of those that were there before.
struct Layer {
  Parameter weight, bias;
  bool has_bias;
  bool is_given;  // run's caller gives the parameters too, and they must be those that are there
  int64_t in, out;
};

// How the layers belong together.
enum class Form {
  chain,        // each takes the output of the one before
  gated,        // two with one input: the gate, then up
  halves,       // one, whose output is gate and up side by side
  halves_swap,  // likewise, up first
};

struct Decided {
  PyObject_HEAD;
  struct State* state;
};

struct State {
  std::vector<PyObject*> owned;
  std::vector<Entry> globals, class_attributes;
  std::vector<PyObject*> empty;  // dicts
  std::vector<Module> modules;   // the first one is the owner
  std::vector<Layer> layers;
  std::vector<int64_t> acts;
  Form form = Form::chain;
  double slope = 0;
  at::ScalarType dtype = at::kFloat;
  c10::Device device = at::kCPU;
  Same plain[2];  // torch.Tensor and torch.nn.Parameter
};

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject* hooks[4] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                        interned("_backward_pre_hooks")};
  PyObject* replaced[3] = {interned("forward"), interned("_compiled_call_impl"), interned("_call_impl")};
  PyObject* modules = interned("_modules");
  PyObject* parameters = interned("_parameters");
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
  const pybind11::object held = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(self, nullptr));
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
    const pybind11::object now =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(entry.table, entry.key));
    if (!now) PyErr_Clear();
    if (!entry.value.is(now.ptr())) return false;
  }
  for (const Module& m : s.modules) {
    dicts.push_back(unchanged(m));
    if (!dicts.back()) return false;
  }
  return true;
}

PyObject* look_up(const Parameter& p, const Dicts& dicts) {
  PyObject* parameters = item(dicts[p.module], names().parameters);
  return parameters ? item(parameters, p.name) : nullptr;
}

// The parameters that the caller of run gives, in the order of the layers. None stands for a bias that is not there.
struct Given {
  PyObject *const *next, *const *end;

  bool is_next(PyObject* parameter) { return !is_end() && *next++ == parameter; }
  bool is_end() {
    while (next != end && *next == Py_None) ++next;
    return next == end;
  }
};

// Collects the tensors of all layers; false if one does not fit.
bool read_parameters(const State& s, const Dicts& dicts, Given given, std::vector<at::Tensor>& weights,
                     OptionalTensorList& biases, bool& learns) {
  for (const Layer& layer : s.layers) {
    PyObject* weight = look_up(layer.weight, dicts);
    PyObject* bias = layer.bias.name ? look_up(layer.bias, dicts) : Py_None;
    if (!weight || !bias || (bias != Py_None) != layer.has_bias) return false;
    if (layer.is_given && !(given.is_next(weight) && (!layer.has_bias || given.is_next(bias)))) return false;
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
  return given.is_end();
}

at::Tensor run_layers(const State& s, const at::Tensor& x, const std::vector<at::Tensor>& weights,
                      const OptionalTensors& biases, bool recorded) {
  const int64_t act = s.acts[0];
  if (s.form == Form::gated)
    return run_gated(x, weights[0], weights[1], get(biases, 0), get(biases, 1), act, s.slope, recorded);
  if (s.form != Form::chain)
    return run_packed(x, weights[0], get(biases, 0), act, s.slope, s.form == Form::halves, recorded);
  // A chain of one layer is decided here on CPU alone.
  return weights.size() == 1 ? run_layer(x, weights[0], get(biases, 0), act, s.slope, recorded)
                             : run_chain(x, weights, biases, s.acts, s.slope, recorded);
}

// run(owner, x, *given): the layers' output, or None if anything differs from what was decided.
PyObject* run_if_unchanged(PyObject* object, PyObject* const* args, Py_ssize_t count) {
  const State& s = *reinterpret_cast<Decided*>(object)->state;
  TORCH_CHECK_TYPE(count >= 2, "Decided.run: expected owner, x and given parameters, got ", count, " arguments");
  Dicts dicts;
  if (!s.modules[0].self.is(args[0]) || is_special_mode(s.device.type()) || !unchanged(s, dicts)) Py_RETURN_NONE;
  const at::Tensor* x = plain_tensor(s, args[1]);
  if (!x || x->dim() < 1 || x->size(-1) != s.layers[0].in) Py_RETURN_NONE;
  std::vector<at::Tensor> weights;
  OptionalTensorList biases;
  bool learns = x->requires_grad();
  if (!read_parameters(s, dicts, {args + 2, args + count}, weights, biases, learns)) Py_RETURN_NONE;
  at::Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = run_layers(s, *x, weights, biases, learns && c10::GradMode::is_enabled());
  }
  return wrap(y);
}

PyObject* run(PyObject* object, PyObject* const* args, Py_ssize_t count) {
  return with_torch_errors([=] { return run_if_unchanged(object, args, count); });
}

PyObject* activations(PyObject* object, PyObject*) {
  const State& s = *reinterpret_cast<Decided*>(object)->state;
  PyObject* codes = PyTuple_New(static_cast<Py_ssize_t>(s.acts.size()));
  for (size_t i = 0; codes && i < s.acts.size(); ++i) PyTuple_SET_ITEM(codes, i, PyLong_FromLongLong(s.acts[i]));
  return codes;
}

// ---- from Python's lists ---------------------------------------------------------------------------------------------

namespace py = pybind11;

PyObject* own(State& s, py::handle object) {
  s.owned.push_back(object.inc_ref().ptr());
  return object.ptr();
}

Same same(State& s, py::handle object) {
  if (PyObject* weak = PyWeakref_NewRef(object.ptr(), nullptr)) {
    s.owned.push_back(weak);
    return {weak, true};
  }
  PyErr_Clear();
  return {own(s, object), false};
}

Same weakly(State& s, py::handle object) {
  const Same made = same(s, object);
  if (!made.weak) throw py::type_error("Decided: expected an object that takes weak references");
  return made;
}

// A row (table, key, value, ...); `missing` as the value stands for a key that must be absent.
Entry entry(State& s, py::handle row, py::handle missing) {
  const py::tuple parts = py::reinterpret_borrow<py::tuple>(row);
  const bool absent = parts[2].ptr() == missing.ptr();
  PyObject* table = parts[0].is_none() ? nullptr : own(s, parts[0]);
  return {table, own(s, parts[1]), absent ? Same{nullptr, false} : same(s, parts[2]), absent};
}

// A place (module, name).
Parameter parameter(State& s, py::handle place) {
  const py::tuple parts = py::reinterpret_borrow<py::tuple>(place);
  const auto at =
      std::find_if(s.modules.begin(), s.modules.end(), [&](const Module& m) { return m.self.is(parts[0].ptr()); });
  if (at == s.modules.end()) throw py::value_error("Decided: expected the layers among the modules");
  return {static_cast<size_t>(at - s.modules.begin()), own(s, parts[1])};
}

py::object tensor_at(py::handle place) {
  const py::tuple parts = py::reinterpret_borrow<py::tuple>(place);
  return parts[0].attr("_parameters")[parts[1]];
}

void fill(State& s, const py::dict& read) {
  const py::object missing = read["missing"];
  for (py::handle dict : read["empty"]) {
    if (!PyDict_Check(dict.ptr())) throw py::type_error("Decided: expected dicts in `empty`");
    s.empty.push_back(own(s, dict));
  }
  for (py::handle row : read["globals"]) s.globals.push_back(entry(s, row, missing));
  for (py::handle row : read["class_attributes"]) s.class_attributes.push_back(entry(s, row, missing));
  for (py::handle row : read["modules"]) {  // module, calls forward alone, entries, children or None
    const py::tuple parts = py::reinterpret_borrow<py::tuple>(row);
    Module m{weakly(s, parts[0]), weakly(s, py::type::handle_of(parts[0])), parts[1].cast<bool>(), {}, false, {}};
    for (py::handle e : parts[2]) m.entries.push_back(entry(s, e, missing));
    m.fixed_children = !parts[3].is_none();
    if (m.fixed_children)
      for (py::handle child : parts[3]) m.children.push_back(same(s, child));
    s.modules.push_back(std::move(m));
  }
  const py::sequence plain = read["plain"];
  for (int i = 0; i < 2; ++i) s.plain[i] = same(s, plain[i]);
  for (py::handle row :
       read["layers"]) {  // places of weight and bias, or None; if they are given; the activation's code
    const py::tuple parts = py::reinterpret_borrow<py::tuple>(row);
    const bool gives_bias = !parts[1].is_none(), has_bias = gives_bias && !tensor_at(parts[1]).is_none();
    const py::object weight = tensor_at(parts[0]);
    const at::Tensor& w = unpack(weight.ptr());
    s.layers.push_back({parameter(s, parts[0]), gives_bias ? parameter(s, parts[1]) : Parameter{0, nullptr}, has_bias,
                        parts[2].cast<bool>(), w.size(1), w.size(0)});
    s.acts.push_back(parts[3].cast<int64_t>());
    s.dtype = w.scalar_type(), s.device = w.device();
  }
  s.slope = read["slope"].cast<double>();
  s.form = static_cast<Form>(read["form"].cast<int>());
  if (s.modules.empty() || s.layers.empty()) throw py::value_error("Decided: expected an owner and a layer");
}

PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* read = nullptr;
  if (!PyArg_ParseTuple(args, "O!:Decided", &PyDict_Type, &read)) return nullptr;
  PyObject* made = type->tp_alloc(type, 0);
  if (!made) return nullptr;
  reinterpret_cast<Decided*>(made)->state = new State;
  try {
    fill(*reinterpret_cast<Decided*>(made)->state, py::reinterpret_borrow<py::dict>(read));
  } catch (py::error_already_set& error) {
    error.restore();
    Py_CLEAR(made);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
    Py_CLEAR(made);
  }
  return made;
}

int traverse(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  if (const State* s = reinterpret_cast<Decided*>(object)->state)
    for (PyObject* held : s->owned) Py_VISIT(held);
  return 0;
}

int clear(PyObject* object) {
  if (State* s = std::exchange(reinterpret_cast<Decided*>(object)->state, nullptr)) {
    for (PyObject* held : s->owned) Py_DECREF(held);
    delete s;
  }
  return 0;
}

void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  PyObject_GC_UnTrack(object);
  clear(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMethodDef kMethods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run)), METH_FASTCALL,
     "run(owner, x, *given): the output of the layers; None if anything that the decision read has changed."},
    {"activations", &activations, METH_NOARGS, "The code of each layer's activation."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_new, reinterpret_cast<void*>(&create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
    {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(&clear)},
    {Py_tp_methods, kMethods},
    {0, nullptr},
};

PyType_Spec kSpec = {"dlkernels._C.Decided", sizeof(Decided), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, kSlots};

}  // namespace

void add_decided(py::module_& m) {
  m.add_object("Decided", py::reinterpret_steal<py::object>(PyType_FromSpec(&kSpec)));
}

}  // namespace dlk::python
