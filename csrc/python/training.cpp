// dlkernels/training decides how a training step runs. A `StepPlan` holds that decision and what was read for it. At each
// step it compares what is there with what was read, by identity, and runs the step only if nothing has changed.
#include "python/training.h"

#include <c10/core/GradMode.h>
#include <c10/util/ScopeExit.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "ops/autograd/mlp_loss.h"
#include "ops/update.h"
#include "python/names.h"
#include "python/tensors.h"

namespace dlk::python {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;

// The entries of a dict as they were read, in their order. Of those with the keys `numbers` only the key must stay: their
// values are read at each step.
class DictContents {
 public:
  DictContents(py::dict dict, const py::tuple& numbers) : dict_(std::move(dict)) {
    for (auto [key, value] : dict_) {
      keys_.push_back(py::reinterpret_borrow<py::object>(key));
      values_.push_back(numbers.contains(key) ? py::object() : py::reinterpret_borrow<py::object>(value));
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
    for (const py::object& value : values_) Py_VISIT(value.ptr());
    return 0;
  }

 private:
  py::dict dict_;
  std::vector<py::object> keys_, values_;
};

class ListContents {
 public:
  explicit ListContents(py::list list) : list_(std::move(list)) {
    for (py::handle item : list_) items_.push_back(py::reinterpret_borrow<py::object>(item));
  }

  bool same() const {
    if (PyList_GET_SIZE(list_.ptr()) != static_cast<Py_ssize_t>(items_.size())) return false;
    for (size_t i = 0; i < items_.size(); ++i)
      if (PyList_GET_ITEM(list_.ptr(), i) != items_[i].ptr()) return false;
    return true;
  }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(list_.ptr());
    for (const py::object& item : items_) Py_VISIT(item.ptr());
    return 0;
  }

 private:
  py::list list_;
  std::vector<py::object> items_;
};

// The class of an object, and what an attribute of it was.
struct ObjectClass {
  py::object object;
  PyTypeObject* type;
};
struct Attribute {
  py::object object, name, value;

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
  py::object object;
  TensorFacts facts;
  bool contiguous;

  explicit Kept(py::handle t)
      : object(py::reinterpret_borrow<py::object>(t)),
        facts(python::unpack(t.ptr())),
        contiguous(python::unpack(t.ptr()).is_contiguous()) {}

  bool same() const {
    const at::Tensor& tensor = python::unpack(object.ptr());
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
  const at::Tensor& t = python::unpack(found);
  if (!t.is_cpu() || t.numel() != 1 || !t.is_floating_point()) return false;
  value = t.item<double>();
  return true;
}

using Handles = std::vector<py::handle>;  // of tensors that `kept_` owns

struct Group {
  py::dict settings;
  OptimizerGroup update;  // its parameters are unpacked at each step
  Handles parameters;
  std::vector<int64_t> gradients;  // places among the gradients
  bool has_momentum;

  // A learning rate on the GPU stays there: to read it would wait for the GPU, and a CUDA graph would freeze it.
  bool read_rate(PyObject* found) {
    update.lr_on_gpu = at::Tensor();
    if (!found || !is_exactly_tensor(found) || !python::unpack(found).is_cuda()) return read_number(found, update.lr);
    const at::Tensor& t = python::unpack(found);
    const bool is_beside = !parameters.empty() && t.device() == python::unpack(parameters[0].ptr()).device();
    if (t.numel() != 1 || t.scalar_type() != at::kFloat || !is_beside) return false;
    update.lr_on_gpu = t;
    return true;
  }

  bool read() {
    static PyObject* const names[] = {
        PyUnicode_InternFromString("lr"),       PyUnicode_InternFromString("weight_decay"),
        PyUnicode_InternFromString("eps"),      PyUnicode_InternFromString("betas"),
        PyUnicode_InternFromString("momentum"), PyUnicode_InternFromString("dampening")};
    auto number = [&](int name, double& value) {
      return read_number(PyDict_GetItem(settings.ptr(), names[name]), value);
    };
    if (!read_rate(PyDict_GetItem(settings.ptr(), names[0])) || !number(1, update.weight_decay)) return false;
    if (update.rule == cpu::UpdateRule::sgd)
      return number(4, update.beta1) && number(5, update.dampening) && (update.beta1 != 0) == has_momentum;
    PyObject* betas = PyDict_GetItem(settings.ptr(), names[3]);
    return betas && PyTuple_CheckExact(betas) && PyTuple_GET_SIZE(betas) == 2 &&
           read_number(PyTuple_GET_ITEM(betas, 0), update.beta1) &&
           read_number(PyTuple_GET_ITEM(betas, 1), update.beta2) && number(2, update.eps);
  }
};

const at::Tensor& unpack(const py::handle& tensor) { return python::unpack(tensor.ptr()); }

void unpack_all(const Handles& tensors, Tensors& to) {
  to.clear();
  for (py::handle t : tensors) to.push_back(unpack(t));
}

// No weight shares memory with another or with x: two parameters may have one `.data`. All are contiguous but x, whose whole
// storage counts.
bool are_disjoint(const at::Tensor& x, const Tensors& weights) {
  std::vector<std::pair<const char*, const char*>> ranges;
  auto add = [&](const void* data, size_t bytes) {
    const char* const from = static_cast<const char*>(data);
    if (bytes > 0) ranges.emplace_back(from, from + bytes);
  };
  add(x.storage().data(), x.storage().nbytes());
  for (const at::Tensor& weight : weights) add(weight.const_data_ptr(), weight.nbytes());
  std::sort(ranges.begin(), ranges.end());
  return std::adjacent_find(ranges.begin(), ranges.end(),
                            [](const auto& a, const auto& b) { return b.first < a.second; }) == ranges.end();
}

// Of parameters it holds what Python holds, and no tensor of C++: torch.utils.swap_tensors refuses tensors that others hold.
class StepPlan {
 public:
  // See StepPlan in dlkernels/_C.pyi.
  StepPlan(py::tuple owners, py::object x, py::object target, bool flattens, const py::list& weights,
           const py::list& biases, std::vector<int64_t> acts, double slope, int64_t kind,
           const py::object& class_weight, int64_t reduction, int64_t ignore_index, double label_smoothing)
      : owners_(std::move(owners)),
        x_type_(Py_TYPE(x.ptr())),
        target_type_(Py_TYPE(target.ptr())),
        x_(unpack(x)),
        target_(unpack(target)),
        flattens_(flattens),
        acts_(std::move(acts)),
        slope_(slope),
        kind_(kind),
        reduction_(reduction),
        ignore_index_(ignore_index),
        label_smoothing_(label_smoothing) {
    for (py::handle weight : weights) {
      weights_.push_back(weight);
      kept_.emplace_back(weight);
      needs_.push_back(unpack(weight).requires_grad());
    }
    for (py::handle bias : biases) {
      biases_.push_back(bias);
      if (!bias.is_none()) kept_.emplace_back(bias);
      needs_.push_back(!bias.is_none() && unpack(bias).requires_grad());
    }
    if (!class_weight.is_none()) {
      class_weight_ = unpack(class_weight);
      kept_.emplace_back(class_weight);
    }
  }

  void add_group(py::dict settings, int rule, std::vector<int64_t> gradients, const py::list& parameters,
                 const py::list& means, const py::list& squares, const py::list& max_squares, const py::list& steps) {
    Group g{std::move(settings), {}, {}, std::move(gradients), !means.empty()};
    auto flag = [&](const char* name) { return g.settings.contains(name) && py::cast<bool>(g.settings[name]); };
    g.update.rule = static_cast<cpu::UpdateRule>(rule);
    g.update.amsgrad = flag("amsgrad"), g.update.maximize = flag("maximize"), g.update.nesterov = flag("nesterov");
    for (py::handle parameter : parameters) g.parameters.push_back(parameter);  // the constructor has kept them
    if (!weights_.empty() && unpack(weights_[0]).dim() == 3)
      g.update.members = std::max<int64_t>(1, unpack(weights_[0]).size(0));
    for (auto [from, to] : {std::pair(&means, &g.update.means), std::pair(&squares, &g.update.squares),
                            std::pair(&max_squares, &g.update.max_squares), std::pair(&steps, &g.update.steps)})
      for (py::handle t : *from) {
        to->push_back(unpack(t));
        kept_.emplace_back(t);
      }
    groups_.push_back(std::move(g));
  }

  // The plan holds while these are as they are now.
  void expect_dict(py::dict dict, const py::tuple& numbers) { dicts_.emplace_back(std::move(dict), numbers); }
  void expect_list(py::list list) { lists_.emplace_back(std::move(list)); }
  void expect_class(py::object object) {
    PyTypeObject* type = Py_TYPE(object.ptr());
    classes_.push_back({std::move(object), type});
  }
  void expect_attribute(py::object object, py::str name, py::object value) {
    attributes_.push_back({std::move(object), std::move(name), std::move(value)});
  }
  // All parameters of the optimizer, whose gradients a step clears.
  void clear_gradients_of(py::list parameters) { cleared_ = std::move(parameters); }

  // Return the loss and the output; or None, with nothing done, if anything has changed. With `only_finite` nothing is updated
  // if the loss, on the CPU, is NaN or infinite.
  PyObject* run(py::handle model, py::handle loss, py::handle optimizer, py::handle x, py::handle target,
                bool keep_grads, bool only_finite) {
    const bool same_owners = model.is(py::handle(PyTuple_GET_ITEM(owners_.ptr(), 0))) &&
                             loss.is(py::handle(PyTuple_GET_ITEM(owners_.ptr(), 1))) &&
                             optimizer.is(py::handle(PyTuple_GET_ITEM(owners_.ptr(), 2)));
    if (!same_owners || Py_TYPE(x.ptr()) != x_type_ || Py_TYPE(target.ptr()) != target_type_ ||
        !same_data(unpack(x), unpack(target)) || !holds())
      Py_RETURN_NONE;
    const at::Tensor x_tensor = unpack(x), target_tensor = unpack(target);
    Tensors weights;
    OptionalTensorList biases;
    unpack_all(weights_, weights);
    for (py::handle bias : biases_) biases.push_back(bias.is_none() ? OptionalTensor() : OptionalTensor(unpack(bias)));
    for (Group& group : groups_) unpack_all(group.parameters, group.update.parameters);
    const auto forgets = c10::make_scope_exit([this] {
      for (Group& group : groups_) group.update.parameters.clear();
    });
    at::Tensor value, output;
    Tensors gradients;
    bool updates = true;
    {
      const py::gil_scoped_release released;
      const c10::AutoGradMode no_grad(false);
      const at::Tensor rows = flattens_ ? x_tensor.flatten(1) : x_tensor;
      const bool by_layer = updates_by_layer(rows, weights);
      if (by_layer) {
        const auto use = [this](size_t l, const at::Tensor& dweight, const at::Tensor& dbias) {
          update_layer(l, dweight, dbias);
        };
        std::tie(value, output, gradients) =
            mlp_loss_for({use, keep_grads}, only_finite, rows, weights, biases, acts_, slope_, target_tensor, kind_,
                         class_weight_, reduction_, ignore_index_, label_smoothing_, needs_);
      } else {
        std::tie(value, output, gradients) =
            call_mlp_loss(rows, weights, biases, acts_, slope_, target_tensor, kind_, class_weight_, reduction_,
                          ignore_index_, label_smoothing_, needs_);
      }
      updates = !only_finite || !value.is_cpu() || is_finite(value);
      Tensors mine;
      for (const Group& group : groups_) {
        if (!updates || by_layer) break;
        mine.clear();
        for (const int64_t place : group.gradients) mine.push_back(gradients[place]);
        update(group.update, mine);
      }
    }
    for (py::handle parameter : cleared_)
      if (unpack(parameter).grad().defined()) unpack(parameter).mutable_grad().reset();
    if (keep_grads && updates)
      for (const Group& group : groups_)
        for (size_t i = 0; i < group.gradients.size(); ++i)
          group.update.parameters[i].mutable_grad() = gradients[group.gradients[i]];
    return py::make_tuple(py::reinterpret_steal<py::object>(wrap(value)),
                          py::reinterpret_steal<py::object>(wrap(output)))
        .release()
        .ptr();
  }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(owners_.ptr());
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
    owners_ = py::make_tuple(py::none(), py::none(), py::none());
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

  // Return true if each layer is updated as soon as its gradients are there: backward reads its weight no more. In smaller
  // networks the gradients stay in cache until the end, and a state that is read in between would take the place of what
  // backward needs: at 784-512-512-10, 256 rows, a step took 2 % longer.
  bool updates_by_layer(const at::Tensor& x, const Tensors& weights) const {
    constexpr size_t kLarge = size_t{8} << 20;
    size_t bytes = 0;
    for (const at::Tensor& weight : weights) bytes += weight.nbytes();
    return bytes > kLarge && weights[0].is_cpu() && weights[0].dim() == 2 &&
           std::all_of(groups_.begin(), groups_.end(), [](const Group& g) { return updates_by_kernel(g.update); }) &&
           are_disjoint(x, weights);
  }

  void update_layer(size_t l, const at::Tensor& dweight, const at::Tensor& dbias) const {
    for (const Group& group : groups_) {
      std::vector<size_t> places;
      Tensors mine;
      auto add = [&](size_t need, const at::Tensor& grad) {
        const auto place = std::count_if(needs_.begin(), needs_.begin() + need, [](int64_t n) { return n != 0; });
        const auto at = std::find(group.gradients.begin(), group.gradients.end(), place);
        if (grad.defined() && at != group.gradients.end())
          places.push_back(at - group.gradients.begin()), mine.push_back(grad);
      };
      add(l, dweight), add(weights_.size() + l, dbias);
      if (!places.empty()) update(part_of(group.update, places), mine);
    }
  }

  py::tuple owners_;  // model, loss, optimizer
  PyTypeObject *x_type_, *target_type_;
  TensorFacts x_, target_;
  bool flattens_;
  Handles weights_, biases_;
  std::vector<int64_t> acts_, needs_;
  double slope_;
  int64_t kind_, reduction_, ignore_index_;
  double label_smoothing_;
  OptionalTensor class_weight_;
  std::vector<Group> groups_;
  py::list cleared_;
  std::vector<Kept> kept_;
  std::vector<DictContents> dicts_;
  std::vector<ListContents> lists_;
  std::vector<ObjectClass> classes_;
  std::vector<Attribute> attributes_;
};

// Python's garbage collector sees through a plan: a model may hold the step that holds the plan.
void collect(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
#if PY_VERSION_HEX >= 0x03090000
    Py_VISIT(Py_TYPE(self));
#endif
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<StepPlan&>(py::handle(self)).visit(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<StepPlan&>(py::handle(self)).forget();
    return 0;
  };
}

}  // namespace

void add_training(py::module_& m) {
  m.def("updates_like_torch", [](const std::string& dtype, int rule) {
    const at::ScalarType types[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};
    return cpu::updates_like_torch(types[static_cast<int>(dtype_named(dtype))], static_cast<cpu::UpdateRule>(rule));
  });
  py::class_<StepPlan>(m, "StepPlan", py::custom_type_setup(&collect))
      .def(py::init<py::tuple, py::object, py::object, bool, const py::list&, const py::list&, std::vector<int64_t>,
                    double, int64_t, const py::object&, int64_t, int64_t, double>())
      .def("add_group", &StepPlan::add_group)
      .def("expect_dict", &StepPlan::expect_dict)
      .def("expect_list", &StepPlan::expect_list)
      .def("expect_class", &StepPlan::expect_class)
      .def("expect_attribute", &StepPlan::expect_attribute)
      .def("clear_gradients_of", &StepPlan::clear_gradients_of)
      .def("run", [](StepPlan& plan, py::handle model, py::handle loss, py::handle optimizer, py::handle x,
                     py::handle target, bool keep_grads, bool only_finite) {
        PyObject* values =
            with_torch_errors([&] { return plan.run(model, loss, optimizer, x, target, keep_grads, only_finite); });
        if (!values) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(values);
      });
}

}  // namespace dlk::python
