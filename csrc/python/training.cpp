// dlkernels/training decides how a training step runs. A `StepPlan` holds that decision and what was read for it. At each
// step it compares what is there with what was read, by identity, and runs the step only if nothing has changed.
#include "python/training.h"

#include <c10/core/GradMode.h>
#include <c10/util/ScopeExit.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "ops/autograd/mlp_loss.h"
#include "ops/update.h"
#include "python/names.h"
#include "python/objects.h"
#include "python/tensors.h"

namespace dlk::python {
namespace {

using Tensors = std::vector<at::Tensor>;

// The entries of a dict as they were read, in their order. Of those with the keys `numbers` only the key must stay: their
// values are read at each step.
class DictContents {
 public:
  DictContents(PyObject* dict, PyObject* numbers) : dict_(Object::borrow(dict)) {
    if (!PyDict_Check(dict)) throw TypeError("StepPlan: expected a dict");
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      const int is_number = PySequence_Contains(numbers, key);
      if (is_number < 0) throw ErrorIsSet();
      keys_.push_back(Object::borrow(key));
      values_.push_back(is_number ? Object() : Object::borrow(value));
    }
  }

  bool same() const {
    PyObject *key = nullptr, *value = nullptr;
    size_t i = 0;
    for (Py_ssize_t at = 0; PyDict_Next(dict_.ptr(), &at, &key, &value); ++i)
      if (i == keys_.size() || keys_[i].ptr() != key || (values_[i] && values_[i].ptr() != value)) return false;
    return i == keys_.size();
  }

  // For Python's garbage collector.
  int visit(visitproc visit, void* arg) const {
    Py_VISIT(dict_.ptr());
    for (const Object& key : keys_) Py_VISIT(key.ptr());
    for (const Object& value : values_) Py_VISIT(value.ptr());
    return 0;
  }

 private:
  Object dict_;
  std::vector<Object> keys_, values_;
};

class ListContents {
 public:
  explicit ListContents(PyObject* list) : list_(Object::borrow(list)) {
    if (!PyList_Check(list)) throw TypeError("StepPlan: expected a list");
    for (PyObject* item : Items(list)) items_.push_back(Object::borrow(item));
  }

  bool same() const {
    if (PyList_GET_SIZE(list_.ptr()) != static_cast<Py_ssize_t>(items_.size())) return false;
    for (size_t i = 0; i < items_.size(); ++i)
      if (PyList_GET_ITEM(list_.ptr(), i) != items_[i].ptr()) return false;
    return true;
  }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(list_.ptr());
    for (const Object& item : items_) Py_VISIT(item.ptr());
    return 0;
  }

 private:
  Object list_;
  std::vector<Object> items_;
};

// The class of an object, and what an attribute of it was.
struct ObjectClass {
  Object object;
  PyTypeObject* type;
};
struct Attribute {
  Object object, name, value;

  bool same() const {
    PyObject* now = PyObject_GetAttr(object.ptr(), name.ptr());
    if (!now) PyErr_Clear();
    Py_XDECREF(now);  // only its identity is used
    return now == value.ptr();
  }
};

// The facts about a tensor that the plan rests on.
struct TensorFacts {
  c10::DispatchKeySet keys;
  at::ScalarType dtype;
  c10::Device device;
  std::vector<int64_t> sizes;
  bool requires_grad;

  explicit TensorFacts(const at::Tensor& t)
      : keys(t.key_set()),
        dtype(t.scalar_type()),
        device(t.device()),
        sizes(t.sizes().vec()),
        requires_grad(t.requires_grad()) {}

  bool same_but_for_sizes(const at::Tensor& t) const {
    return t.key_set() == keys && t.scalar_type() == dtype && t.device() == device &&
           t.requires_grad() == requires_grad;
  }
  bool same(const at::Tensor& t) const { return same_but_for_sizes(t) && t.sizes() == at::IntArrayRef(sizes); }
};

// A parameter, or a tensor of a state or of the loss: a leaf without hooks.
struct Kept {
  Object object;
  TensorFacts facts;
  bool contiguous;

  explicit Kept(PyObject* t) : object(Object::borrow(t)), facts(unpack(t)), contiguous(unpack(t).is_contiguous()) {}

  bool same() const {
    const at::Tensor& tensor = unpack(object.ptr());
    return facts.same(tensor) && tensor.is_contiguous() == contiguous && !tensor.grad_fn() && !has_hooks(object.ptr());
  }
};

// Settings of an optimizer that may be another number at each step, as schedules set them.
bool read_number(PyObject* found, double& value) {
  if (!found) return false;
  if (PyFloat_CheckExact(found)) {
    value = PyFloat_AS_DOUBLE(found);
    return true;
  }
  if (PyLong_CheckExact(found)) {
    value = PyLong_AsDouble(found);
    if (PyErr_Occurred()) PyErr_Clear();
    return true;
  }
  if (!is_exactly_tensor(found)) return false;
  const at::Tensor& t = unpack(found);
  if (!t.is_cpu() || t.numel() != 1 || !t.is_floating_point()) return false;
  value = t.item<double>();
  return true;
}

using Borrowed = std::vector<PyObject*>;  // tensors that `kept_` owns

struct Group {
  Object settings;        // a dict
  OptimizerGroup update;  // its parameters are unpacked at each step
  Borrowed parameters;
  std::vector<int64_t> gradients;  // places among the gradients
  bool has_momentum;

  bool read() {
    static PyObject* const names[] = {
        PyUnicode_InternFromString("lr"),       PyUnicode_InternFromString("weight_decay"),
        PyUnicode_InternFromString("eps"),      PyUnicode_InternFromString("betas"),
        PyUnicode_InternFromString("momentum"), PyUnicode_InternFromString("dampening")};
    auto number = [&](int name, double& value) {
      return read_number(PyDict_GetItem(settings.ptr(), names[name]), value);
    };
    if (!number(0, update.lr) || !number(1, update.weight_decay)) return false;
    if (update.rule == cpu::UpdateRule::sgd)
      return number(4, update.beta1) && number(5, update.dampening) && (update.beta1 != 0) == has_momentum;
    PyObject* betas = PyDict_GetItem(settings.ptr(), names[3]);
    return betas && PyTuple_CheckExact(betas) && PyTuple_GET_SIZE(betas) == 2 &&
           read_number(PyTuple_GET_ITEM(betas, 0), update.beta1) &&
           read_number(PyTuple_GET_ITEM(betas, 1), update.beta2) && number(2, update.eps);
  }
};

void unpack_all(const Borrowed& tensors, Tensors& to) {
  to.clear();
  for (PyObject* t : tensors) to.push_back(unpack(t));
}

// Of parameters it holds what Python holds, and no tensor of C++: torch.utils.swap_tensors refuses tensors that others hold.
class StepPlan {
 public:
  using Owners = std::array<PyObject*, 3>;

  // See StepPlan in dlkernels/_C.pyi.
  StepPlan(Owners owners, PyObject* x, PyObject* target, bool flattens, PyObject* weights, PyObject* biases,
           std::vector<int64_t> acts, double slope, int64_t kind, PyObject* class_weight, int64_t reduction,
           int64_t ignore_index, double label_smoothing)
      : x_type_(Py_TYPE(x)),
        target_type_(Py_TYPE(target)),
        x_(unpack(x)),
        target_(unpack(target)),
        flattens_(flattens),
        acts_(std::move(acts)),
        slope_(slope),
        kind_(kind),
        reduction_(reduction),
        ignore_index_(ignore_index),
        label_smoothing_(label_smoothing) {
    for (size_t i = 0; i < owners.size(); ++i) owners_[i] = Object::borrow(owners[i]);
    for (PyObject* weight : Items(weights)) {
      weights_.push_back(weight);
      kept_.emplace_back(weight);
      needs_.push_back(unpack(weight).requires_grad());
    }
    for (PyObject* bias : Items(biases)) {
      biases_.push_back(bias);
      if (bias != Py_None) kept_.emplace_back(bias);
      needs_.push_back(bias != Py_None && unpack(bias).requires_grad());
    }
    if (class_weight != Py_None) {
      class_weight_ = unpack(class_weight);
      kept_.emplace_back(class_weight);
    }
  }

  void add_group(PyObject* settings, int rule, std::vector<int64_t> gradients, PyObject* parameters, PyObject* means,
                 PyObject* squares, PyObject* max_squares, PyObject* steps) {
    Group g{Object::borrow(settings), {}, {}, std::move(gradients), Items(means).size() > 0};
    auto flag = [&](const char* name) {
      PyObject* found = PyDict_GetItemString(settings, name);
      return found && from_python<bool>(found);
    };
    g.update.rule = static_cast<cpu::UpdateRule>(rule);
    g.update.amsgrad = flag("amsgrad"), g.update.maximize = flag("maximize"), g.update.nesterov = flag("nesterov");
    for (PyObject* parameter : Items(parameters)) g.parameters.push_back(parameter);  // the constructor has kept them
    if (!weights_.empty() && unpack(weights_[0]).dim() == 3)
      g.update.members = std::max<int64_t>(1, unpack(weights_[0]).size(0));
    for (auto [from, to] : {std::pair(means, &g.update.means), std::pair(squares, &g.update.squares),
                            std::pair(max_squares, &g.update.max_squares), std::pair(steps, &g.update.steps)})
      for (PyObject* t : Items(from)) {
        to->push_back(unpack(t));
        kept_.emplace_back(t);
      }
    groups_.push_back(std::move(g));
  }

  // The plan holds while these are as they are now.
  void expect_dict(PyObject* dict, PyObject* numbers) { dicts_.emplace_back(dict, numbers); }
  void expect_list(PyObject* list) { lists_.emplace_back(list); }
  void expect_class(PyObject* object) { classes_.push_back({Object::borrow(object), Py_TYPE(object)}); }
  void expect_attribute(PyObject* object, PyObject* name, PyObject* value) {
    attributes_.push_back({Object::borrow(object), Object::borrow(name), Object::borrow(value)});
  }
  // All parameters of the optimizer, whose gradients a step clears.
  void clear_gradients_of(PyObject* parameters) { cleared_ = Object::borrow(parameters); }

  // Return the loss and the output; or None, with nothing done, if anything has changed. With `only_finite` nothing is updated
  // if the loss, on the CPU, is NaN or infinite.
  Object run(PyObject* model, PyObject* loss, PyObject* optimizer, PyObject* x, PyObject* target, bool keep_grads,
             bool only_finite) {
    const bool same_owners = model == owners_[0].ptr() && loss == owners_[1].ptr() && optimizer == owners_[2].ptr();
    if (!same_owners || Py_TYPE(x) != x_type_ || Py_TYPE(target) != target_type_ ||
        !same_data(unpack(x), unpack(target)) || !holds())
      return Object::borrow(Py_None);
    const at::Tensor x_tensor = unpack(x), target_tensor = unpack(target);
    Tensors weights;
    OptionalTensorList biases;
    unpack_all(weights_, weights);
    for (PyObject* bias : biases_) biases.push_back(bias == Py_None ? OptionalTensor() : OptionalTensor(unpack(bias)));
    for (Group& group : groups_) unpack_all(group.parameters, group.update.parameters);
    const auto forgets = c10::make_scope_exit([this] {
      for (Group& group : groups_) group.update.parameters.clear();
    });
    at::Tensor value, output;
    Tensors gradients;
    bool updates = true;
    {
      const Unlocked released;
      const c10::AutoGradMode no_grad(false);
      std::tie(value, output, gradients) =
          call_mlp_loss(flattens_ ? x_tensor.flatten(1) : x_tensor, weights, biases, acts_, slope_, target_tensor,
                        kind_, class_weight_, reduction_, ignore_index_, label_smoothing_, needs_);
      updates = !only_finite || !value.is_cpu() || std::isfinite((value.dim() ? value.sum() : value).item<double>());
      Tensors mine;
      for (const Group& group : groups_) {
        if (!updates) break;
        mine.clear();
        for (const int64_t place : group.gradients) mine.push_back(gradients[place]);
        update(group.update, mine);
      }
    }
    for (PyObject* parameter : Items(cleared_.ptr()))
      if (unpack(parameter).grad().defined()) unpack(parameter).mutable_grad().reset();
    if (keep_grads && updates)
      for (const Group& group : groups_)
        for (size_t i = 0; i < group.gradients.size(); ++i)
          group.update.parameters[i].mutable_grad() = gradients[group.gradients[i]];
    return tuple_of(made(wrap(value)), made(wrap(output)));
  }

  int visit(visitproc visit, void* arg) const {
    for (const Object& owner : owners_) Py_VISIT(owner.ptr());
    for (const DictContents& dict : dicts_)
      if (int stop = dict.visit(visit, arg)) return stop;
    for (const ListContents& list : lists_)
      if (int stop = list.visit(visit, arg)) return stop;
    for (const ObjectClass& c : classes_) Py_VISIT(c.object.ptr());
    for (const Attribute& a : attributes_) {
      Py_VISIT(a.object.ptr());
      Py_VISIT(a.value.ptr());
    }
    for (const Kept& kept : kept_) Py_VISIT(kept.object.ptr());
    for (const Group& group : groups_) Py_VISIT(group.settings.ptr());
    Py_VISIT(cleared_.ptr());
    return 0;
  }
  void forget() {
    auto cleared = std::make_tuple(std::move(owners_), std::move(dicts_), std::move(lists_), std::move(classes_),
                                   std::move(attributes_), std::move(kept_), std::move(groups_), std::move(cleared_));
  }

 private:
  // Batches may have another number of rows.
  bool same_data(const at::Tensor& x, const at::Tensor& target) const {
    if (!x_.same_but_for_sizes(x) || !target_.same_but_for_sizes(target)) return false;
    const at::IntArrayRef x_sizes = x.sizes(), target_sizes = target.sizes(), x_was(x_.sizes),
                          target_was(target_.sizes);
    if (x_sizes.size() < 2 || target_sizes.empty()) return x_sizes == x_was && target_sizes == target_was;
    return x_sizes.size() == x_was.size() && target_sizes.size() == target_was.size() &&
           x_sizes.slice(1) == x_was.slice(1) && target_sizes.slice(1) == target_was.slice(1) &&
           x_sizes[0] - x_was[0] == target_sizes[0] - target_was[0];
  }

  bool holds() {
    auto same = [](const auto& fact) { return fact.same(); };
    return std::all_of(classes_.begin(), classes_.end(),
                       [](const ObjectClass& c) { return Py_TYPE(c.object.ptr()) == c.type; }) &&
           std::all_of(dicts_.begin(), dicts_.end(), same) && std::all_of(lists_.begin(), lists_.end(), same) &&
           std::all_of(attributes_.begin(), attributes_.end(), same) && std::all_of(kept_.begin(), kept_.end(), same) &&
           std::all_of(groups_.begin(), groups_.end(), [](Group& group) { return group.read(); });
  }

  std::array<Object, 3> owners_;  // model, loss, optimizer
  PyTypeObject *x_type_, *target_type_;
  TensorFacts x_, target_;
  bool flattens_;
  Borrowed weights_, biases_;
  std::vector<int64_t> acts_, needs_;
  double slope_;
  int64_t kind_, reduction_, ignore_index_;
  double label_smoothing_;
  OptionalTensor class_weight_;
  std::vector<Group> groups_;
  Object cleared_ = List();
  std::vector<Kept> kept_;
  std::vector<DictContents> dicts_;
  std::vector<ListContents> lists_;
  std::vector<ObjectClass> classes_;
  std::vector<Attribute> attributes_;
};

bool updates_like_torch(const std::string& dtype, int rule) {
  const at::ScalarType types[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};
  return cpu::updates_like_torch(types[static_cast<int>(dtype_named(dtype))], static_cast<cpu::UpdateRule>(rule));
}

// See StepPlan in dlkernels/_C.pyi. Python's garbage collector sees through it: a model may hold the step that holds the plan.
using Plan = Holder<StepPlan>;

PyObject* create(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  if (keywords && PyDict_GET_SIZE(keywords)) {
    PyErr_SetString(PyExc_TypeError, "StepPlan takes no keyword arguments");
    return nullptr;
  }
  return Plan::create(type, [&] {
    using Arguments = std::tuple<StepPlan::Owners, PyObject*, PyObject*, bool, PyObject*, PyObject*,
                                 std::vector<int64_t>, double, int64_t, PyObject*, int64_t, int64_t, double>;
    return std::apply([](auto&&... a) { return new StepPlan(std::move(a)...); }, from_python<Arguments>(args));
  });
}

PyObject* run(PyObject* plan, PyObject* args) {
  return with_torch_errors([&]() -> PyObject* {
    using Arguments = std::tuple<PyObject*, PyObject*, PyObject*, PyObject*, PyObject*, bool, bool>;
    auto run = [&](const auto&... a) { return Plan::of(plan).run(a...); };
    return std::apply(run, from_python<Arguments>(args)).release();
  });
}

constexpr std::array<const char*, 2> kUpdatesLikeTorch = {"dtype", "rule"};

PyMethodDef kFunctions[] = {
    function<kUpdatesLikeTorch, &updates_like_torch>("updates_like_torch",
                                                     "True if our update of parameters has the bits of torch's."),
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef kMethods[] = {
    method<&StepPlan::add_group>("add_group"),
    method<&StepPlan::expect_dict>("expect_dict"),
    method<&StepPlan::expect_list>("expect_list"),
    method<&StepPlan::expect_class>("expect_class"),
    method<&StepPlan::expect_attribute>("expect_attribute"),
    method<&StepPlan::clear_gradients_of>("clear_gradients_of"),
    {"run", &run, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_training(PyObject* module) {
  add_functions(module, kFunctions);
  add_object(module, "StepPlan", class_of<StepPlan>("dlkernels._C.StepPlan", &create, kMethods));
}

}  // namespace dlk::python
