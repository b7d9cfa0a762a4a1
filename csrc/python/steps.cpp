#include "python/steps.h"

#include <optional>
#include <vector>

namespace dlk::python {
namespace {

namespace py = pybind11;

// Calls that follow one another, each with what was decided the last time: it runs as in stock, a chain begins with it, or
// Python must decide. They are the modules of a container, or the calls of a statement. To run a call as in stock is right in
// every state; at worst something is not fused that could be. Nothing here keeps a module alive.
class Steps {
 public:
  Steps(const py::object& owner, const py::sequence& called, const py::sequence& begins)
      : owner_(owner), cls_(Py_TYPE(owner.ptr())) {
    for (size_t i = 0; i < called.size(); ++i) {
      const py::object one = called[i];
      steps_.push_back({weakly(one), Py_TYPE(one.ptr()), py::cast<bool>(begins[i]), {}, 0, {}});
    }
  }

  // A chain begins with call i, and ends with call `last`; or later, with the group of this number (written.py).
  void keep(size_t i, py::object decision, size_t last, std::optional<int64_t> group) {
    if (outdated_) return;
    if (i >= steps_.size() || last < i || last >= steps_.size()) throw py::index_error("Steps.keep: no such call");
    if (decision.is_none()) throw py::type_error("Steps.keep: expected a decision");
    steps_[i].decision = std::move(decision), steps_[i].last = last, steps_[i].group = group;
  }

  void leave(size_t i) {
    if (outdated_) return;
    if (i >= steps_.size()) throw py::index_error("Steps.leave: no such call");
    steps_[i].decides = false;
  }

  bool outdated() const { return outdated_; }

  // Run the modules that the iterator gives, from number i on. Return (x, i, pending): the value before the first module that
  // Python must decide about, its number, and what the iterator has given from it on; pending is empty at the end.
  py::tuple run_modules(const py::object& owner, py::object x, const py::object& rest, size_t i) {
    if (!PyIter_Check(rest.ptr())) throw py::type_error("Steps.run_modules: expected an iterator");
    compare_owner(owner);
    while (py::object module = next(rest)) {
      py::list pending;
      pending.append(module);
      if (!is(i, module)) return py::make_tuple(x, i, pending);
      const Step step = steps_[i];  // a copy: the module may run this container again
      if (!step.decides) {
        x = called(module, x);
        ++i;
        continue;
      }
      // The iterator may be older than what the decision compares, so its modules are compared too.
      bool same = bool(step.decision);
      for (size_t k = i + 1; same && k <= step.last; ++k) {
        const py::object following = next(rest);
        if (!following) break;
        pending.append(following);
        same = is(k, following);
      }
      py::object y = same && pending.size() == step.last - i + 1 ? step.run(owner, x) : py::object();
      if (!y) return py::make_tuple(x, i, pending);
      x = std::move(y), i = step.last + 1;
    }
    return py::make_tuple(x, i, py::list());
  }

  // Run the calls that `looked_up` returns, the innermost last. Return (x, reached): the value and the last group that ran, of
  // which `at` is the first. Return (x, i, calls) before a call that Python must decide about. The decision of a chain that
  // begins the statement needs no look-up; if it does not hold, nothing was looked up, and calls is None.
  py::tuple run_statement(const py::object& owner, py::object x, const py::object& looked_up, int64_t at) {
    compare_owner(owner);
    size_t i = 0;
    if (!outdated_ && !steps_.empty() && steps_[0].decision) {
      const Step step = steps_[0];
      py::object y = step.run(owner, x);
      if (!y) return py::make_tuple(x, 0, py::none());
      if (step.group) return py::make_tuple(y, *step.group);
      x = std::move(y), i = step.last + 1;
    }
    const py::tuple calls = reversed(looked_up());
    const py::tuple ran = run_calls(owner, x, calls, i);
    if (!ran[2].is_none()) return py::make_tuple(ran[0], ran[2]);
    if (py::cast<size_t>(ran[1]) == calls.size()) return py::make_tuple(ran[0], at);
    return py::make_tuple(ran[0], ran[1], calls);
  }

  // Run calls from number i on. A call is a pair of a callee and a function that returns its further arguments, or None.
  // Return (x, i, group): the value before the first call that Python must decide about, and its number.
  py::tuple run_calls(const py::object& owner, py::object x, const py::tuple& calls, size_t i) {
    compare_owner(owner);
    outdated_ = outdated_ || calls.size() != steps_.size();
    while (i < calls.size()) {
      const py::tuple call = tuple_of(calls[i], 2);
      if (!is(i, call[0])) break;
      const Step step = steps_[i];
      if (!step.decides) {
        x = called(call[0], x, call[1]);
      } else if (py::object y = are(calls, i, step.last) ? step.run(owner, x) : py::object()) {
        x = std::move(y), i = step.last;
        if (step.group) return py::make_tuple(x, i + 1, step.group);
      } else {
        break;
      }
      ++i;
    }
    return py::make_tuple(x, i, py::none());
  }

 private:
  struct Step {
    py::object reference;  // to what is called
    PyTypeObject* cls;     // it is only compared
    bool decides;
    py::object decision;  // with run(owner, x), which returns None if it does not hold; null before the first
    size_t last;
    std::optional<int64_t> group;

    // Return null if nothing is decided or the decision does not hold.
    py::object run(const py::object& owner, const py::object& x) const {
      if (!decision) return {};
      static PyObject* const name = PyUnicode_InternFromString("run");
      PyObject* args[] = {decision.ptr(), owner.ptr(), x.ptr()};
      PyObject* y = PyObject_VectorcallMethod(name, args, 3, nullptr);
      if (!y) throw py::error_already_set();
      py::object made = py::reinterpret_steal<py::object>(y);
      return made.is_none() ? py::object() : made;
    }
  };

  // Return a weak reference; what takes none, such as a method of tensors, lives as long as its class. A bound method is another
  // object at each look-up. It begins no chain, and no decision has it: null stands for any.
  static py::object weakly(const py::object& one) {
    if (PyMethod_Check(one.ptr())) return {};
    if (PyObject* made = PyWeakref_NewRef(one.ptr(), nullptr)) return py::reinterpret_steal<py::object>(made);
    PyErr_Clear();
    return one;
  }

  // Return a tuple as it is; `size` 0 stands for any. Null is an error of Python's.
  static py::tuple tuple_of(const py::object& one, size_t size = 0) {
    if (!one) throw py::error_already_set();
    if (!PyTuple_Check(one.ptr()) || (size && py::len(one) != size)) throw py::type_error("Steps: expected a tuple");
    return py::reinterpret_borrow<py::tuple>(one);
  }

  static py::object called(const py::object& callee, const py::object& x) {
    PyObject* y = PyObject_CallOneArg(callee.ptr(), x.ptr());
    if (!y) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(y);
  }

  static py::object called(const py::object& callee, const py::object& x, const py::object& arguments) {
    if (arguments.is_none()) return called(callee, x);
    const py::tuple given = tuple_of(py::reinterpret_steal<py::object>(PyObject_CallNoArgs(arguments.ptr())), 2);
    const py::tuple more = tuple_of(given[0]);
    if (!py::isinstance<py::dict>(given[1])) throw py::type_error("Steps: expected keywords in a dict");
    py::tuple args(more.size() + 1);
    args[0] = x;
    for (size_t i = 0; i < more.size(); ++i) args[i + 1] = more[i];
    PyObject* y = PyObject_Call(callee.ptr(), args.ptr(), py::object(given[1]).ptr());
    if (!y) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(y);
  }

  static py::tuple reversed(const py::object& calls) {
    const py::tuple given = tuple_of(calls);
    py::tuple made(given.size());
    for (size_t i = 0; i < given.size(); ++i) made[given.size() - 1 - i] = given[i];
    return made;
  }

  // Return null at the end.
  static py::object next(const py::object& rest) {
    py::object found = py::reinterpret_steal<py::object>(PyIter_Next(rest.ptr()));
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  void compare_owner(const py::object& owner) {
    outdated_ = outdated_ || !owner_().is(owner) || Py_TYPE(owner.ptr()) != cls_;
  }

  bool is_same(size_t i, const py::object& now) const {
    const py::object& reference = steps_[i].reference;
    const bool same = !reference || (PyWeakref_Check(reference.ptr()) ? reference().is(now) : reference.is(now));
    return same && Py_TYPE(now.ptr()) == steps_[i].cls;
  }

  bool is(size_t i, const py::object& now) {
    outdated_ = outdated_ || i >= steps_.size() || !is_same(i, now);
    return !outdated_;
  }

  // Other code may have run since the calls were looked up.
  bool are(const py::tuple& calls, size_t i, size_t last) {
    for (; i <= last; ++i)
      if (!is(i, tuple_of(calls[i], 2)[0])) return false;
    return true;
  }

  py::weakref owner_;
  PyTypeObject* cls_;  // of the owner
  std::vector<Step> steps_;
  bool outdated_ = false;  // the owner or a callee is another one
};

}  // namespace

void add_steps(py::module_& m) {
  py::class_<Steps>(m, "Steps", "Calls that follow one another, each with what was decided the last time.")
      .def(py::init<const py::object&, const py::sequence&, const py::sequence&>(), py::arg("owner"), py::arg("called"),
           py::arg("begins"))
      .def("keep", &Steps::keep, py::arg("i"), py::arg("decision"), py::arg("last"), py::arg("group") = py::none(),
           "A chain begins with call i: its decision, and its last call, or the group that it ends.")
      .def("leave", &Steps::leave, py::arg("i"), "Call i runs as in stock from now on.")
      .def("run_modules", &Steps::run_modules, py::arg("owner"), py::arg("x"), py::arg("rest"), py::arg("i"),
           "Run an iterator's modules from number i on; return (x, i, pending) before one that Python must decide "
           "about.")
      .def("run_statement", &Steps::run_statement, py::arg("owner"), py::arg("x"), py::arg("looked_up"), py::arg("at"),
           "Run the calls that looked_up() returns; return (x, the last group that ran), or (x, i, calls) before one "
           "that "
           "Python must decide about.")
      .def("run_calls", &Steps::run_calls, py::arg("owner"), py::arg("x"), py::arg("calls"), py::arg("i"),
           "Run calls from number i on; return (x, i, group) before one that Python must decide about.")
      .def_property_readonly("outdated", &Steps::outdated, "The owner or a callee is another one.");
}

}  // namespace dlk::python
