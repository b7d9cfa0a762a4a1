// Python's objects in C++, by Python's own API: counted references, conversions, and functions and classes of the module.
// pybind11 offers more, and costs a compiler 5 s and 380 MB in each file that includes it.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace dlk::python {

// Thrown where Python has set its error.
struct ErrorIsSet {};

// Becomes Python's TypeError. std::invalid_argument becomes its ValueError.
struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Set Python's error to what is being caught.
void set_error();

// Return what f returns; null, with Python's error set, if it throws.
template <class F>
auto guarded(const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (...) {
    set_error();
    return nullptr;
  }
}

// A reference to an object, or to none.
class Object {
 public:
  Object() = default;
  Object(const Object& other) : object_(Py_XNewRef(other.object_)) {}
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  // Takes over a reference.
  static Object steal(PyObject* object) {
    Object made;
    made.object_ = object;
    return made;
  }
  static Object borrow(PyObject* object) { return steal(Py_XNewRef(object)); }

  PyObject* ptr() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// The object that a function of Python made; throws if it made none.
inline Object made(PyObject* object) {
  if (!object) throw ErrorIsSet();
  return Object::steal(object);
}

// The items of a list or a tuple, or of another iterable.
class Items {
 public:
  explicit Items(PyObject* iterable) : all_(made(PySequence_Fast(iterable, "expected an iterable"))) {}
  PyObject** begin() const { return PySequence_Fast_ITEMS(all_.ptr()); }
  PyObject** end() const { return begin() + size(); }
  size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(all_.ptr())); }
  PyObject* operator[](size_t i) const { return begin()[i]; }

 private:
  Object all_;
};

// ---- C++ to Python ---------------------------------------------------------------------------------------------------

inline Object to_python(Object value) { return value; }
inline Object to_python(bool value) { return Object::borrow(value ? Py_True : Py_False); }
inline Object to_python(int value) { return made(PyLong_FromLong(value)); }
inline Object to_python(int64_t value) { return made(PyLong_FromLongLong(value)); }
inline Object to_python(const char* text) { return text ? made(PyUnicode_FromString(text)) : Object::borrow(Py_None); }
inline Object to_python(const std::string& text) {
  return made(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

// Containers hold their values as to_python gives them.
class List : public Object {
 public:
  List() : Object(made(PyList_New(0))) {}
  template <class T>
  void append(const T& value) {
    if (PyList_Append(ptr(), to_python(value).ptr())) throw ErrorIsSet();
  }
};

inline Object to_python(const std::vector<std::string>& texts) {
  List list;
  for (const std::string& text : texts) list.append(text);
  return list;
}

class Dict : public Object {
 public:
  Dict() : Object(made(PyDict_New())) {}
  template <class T>
  void set(const char* key, const T& value) {
    if (PyDict_SetItemString(ptr(), key, to_python(value).ptr())) throw ErrorIsSet();
  }
};

template <class... T>
Object tuple_of(const T&... values) {
  Object tuple = made(PyTuple_New(sizeof...(T)));
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(tuple.ptr(), i++, to_python(values).release()), ...);
  return tuple;
}

// ---- Python to C++ ---------------------------------------------------------------------------------------------------

template <class T>
struct From;

template <class T>
T from_python(PyObject* object) {
  return From<T>::object(object);
}

template <>
struct From<PyObject*> {
  static PyObject* object(PyObject* value) { return value; }
};
template <>
struct From<bool> {
  static bool object(PyObject* value) {
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw ErrorIsSet();
    return truth;
  }
};
template <>
struct From<int64_t> {
  static int64_t object(PyObject* value) {
    const int64_t number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) throw ErrorIsSet();
    return number;
  }
};
template <>
struct From<int> {
  static int object(PyObject* value) {
    const int64_t number = from_python<int64_t>(value);
    if (number != static_cast<int>(number))
      throw TypeError("expected an int of 32 bits, got " + std::to_string(number));
    return static_cast<int>(number);
  }
};
template <>
struct From<double> {
  static double object(PyObject* value) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred()) throw ErrorIsSet();
    return number;
  }
};
template <>
struct From<std::string> {
  static std::string object(PyObject* value) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value, &size);
    if (!text) throw ErrorIsSet();
    return {text, static_cast<size_t>(size)};
  }
};
template <class T>
struct From<std::vector<T>> {
  static std::vector<T> object(PyObject* value) {
    std::vector<T> read;
    for (PyObject* item : Items(value)) read.push_back(from_python<T>(item));
    return read;
  }
};

inline void check_size(const Items& items, size_t expected) {
  if (items.size() != expected)
    throw TypeError("expected " + std::to_string(expected) + " values, got " + std::to_string(items.size()));
}

template <class T, size_t size>
struct From<std::array<T, size>> {
  static std::array<T, size> object(PyObject* value) {
    const Items items(value);
    check_size(items, size);
    std::array<T, size> read;
    for (size_t i = 0; i < size; ++i) read[i] = from_python<T>(items[i]);
    return read;
  }
};
template <class... T>
struct From<std::tuple<T...>> {
  static std::tuple<T...> object(PyObject* value) {
    const Items items(value);
    check_size(items, sizeof...(T));
    return read(items, std::index_sequence_for<T...>());
  }

 private:
  template <size_t... i>
  static std::tuple<T...> read(const Items& items, std::index_sequence<i...>) {
    return {from_python<T>(items[i])...};
  }
};

// ---- functions and classes -------------------------------------------------------------------------------------------

// Put the arguments of a call in the order of their `names`; null for one that is not there.
void put_in_order(PyObject* const* args, Py_ssize_t count, PyObject* keywords, const char* const* names, size_t size,
                  PyObject** ordered);

[[noreturn]] void refuse_missing(const char* name);

// An argument; one that may be missing is an std::optional.
template <class T>
struct Argument {
  static T of(PyObject* value, const char* name) {
    if (!value) refuse_missing(name);
    return from_python<T>(value);
  }
};
template <class T>
struct Argument<std::optional<T>> {
  static std::optional<T> of(PyObject* value, const char*) {
    return value ? std::optional<T>(from_python<T>(value)) : std::nullopt;
  }
};

// f as a function of the module, whose arguments have these names (an array at namespace scope).
template <const auto& names, auto f>
struct Function;
template <const auto& names, class R, class... Args, R (*f)(Args...)>
struct Function<names, f> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
    return guarded([&] {
      std::array<PyObject*, sizeof...(Args)> ordered{};
      put_in_order(args, count, keywords, names.data(), names.size(), ordered.data());
      return with(ordered, std::index_sequence_for<Args...>());
    });
  }

 private:
  template <size_t... i>
  static PyObject* with(const std::array<PyObject*, sizeof...(Args)>& args, std::index_sequence<i...>) {
    static_assert(names.size() == sizeof...(Args));
    return to_python(f(Argument<std::decay_t<Args>>::of(args[i], names[i])...)).release();
  }
};

// The entry of a table of functions.
template <const auto& names, auto f>
PyMethodDef function(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function<names, f>::call)),
          METH_FASTCALL | METH_KEYWORDS, doc};
}

inline constexpr std::array<const char*, 0> kNoNames{};

// `methods` ends with an entry of nulls, and lives as long as the module.
inline void add_functions(PyObject* module, PyMethodDef* methods) {
  if (PyModule_AddFunctions(module, methods)) throw ErrorIsSet();
}

inline void add_object(PyObject* module, const char* name, const Object& value) {
  if (PyModule_AddObjectRef(module, name, value.ptr())) throw ErrorIsSet();
}

// An object of a class of the module. T has `visit`, which shows Python's garbage collector the objects that it holds, and
// `forget`, which lets go of them.
template <class T>
struct Holder {
  PyObject_HEAD;
  T* held;

  static T& of(PyObject* object) { return *reinterpret_cast<Holder*>(object)->held; }

  // A new object; `make` returns its T.
  template <class Make>
  static PyObject* create(PyTypeObject* type, const Make& make) {
    return guarded([&] {
      Object object = made(type->tp_alloc(type, 0));
      reinterpret_cast<Holder*>(object.ptr())->held = make();
      return object.release();
    });
  }
  static int traverse(PyObject* object, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(object));
    const T* held = reinterpret_cast<Holder*>(object)->held;
    return held ? held->visit(visit, arg) : 0;
  }
  static int clear(PyObject* object) {
    if (T* held = reinterpret_cast<Holder*>(object)->held) held->forget();
    return 0;
  }
  static void destroy(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    delete reinterpret_cast<Holder*>(object)->held;
    type->tp_free(object);
    Py_DECREF(type);
  }
};

// A method of such a class, which takes arguments by place and returns nothing.
template <auto f>
struct Method;
template <class T, class... Args, void (T::*f)(Args...)>
struct Method<f> {
  static PyObject* call(PyObject* object, PyObject* args) {
    return guarded([&] {
      auto run = [&](auto&&... a) { (Holder<T>::of(object).*f)(std::move(a)...); };
      std::apply(run, from_python<std::tuple<std::decay_t<Args>...>>(args));
      return Object::borrow(Py_None).release();
    });
  }
};

template <auto f>
constexpr PyMethodDef method(const char* name) {
  return {name, &Method<f>::call, METH_VARARGS, nullptr};
}

// The class of these objects: `create` is its tp_new.
template <class T>
Object class_of(const char* name, PyObject* (*create)(PyTypeObject*, PyObject*, PyObject*), PyMethodDef* methods) {
  PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(create)},
      {Py_tp_dealloc, reinterpret_cast<void*>(&Holder<T>::destroy)},
      {Py_tp_traverse, reinterpret_cast<void*>(&Holder<T>::traverse)},
      {Py_tp_clear, reinterpret_cast<void*>(&Holder<T>::clear)},
      {Py_tp_methods, methods},
      {0, nullptr},
  };
  PyType_Spec spec = {name, sizeof(Holder<T>), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};
  return made(PyType_FromSpec(&spec));
}

// Lets other threads of Python run as long as it lives.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

}  // namespace dlk::python
