#include "python/objects.h"

#include <cstring>

namespace dlk::python {

void set_error() {
  try {
    throw;
  } catch (const ErrorIsSet&) {
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

void put_in_order(PyObject* const* args, Py_ssize_t count, PyObject* keywords, const char* const* names, size_t size,
                  PyObject** ordered) {
  const auto positional = static_cast<size_t>(count);
  if (positional > size)
    throw TypeError("expected " + std::to_string(size) + " arguments, got " + std::to_string(positional));
  for (size_t i = 0; i < positional; ++i) ordered[i] = args[i];
  const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
  for (Py_ssize_t k = 0; k < named; ++k) {
    const std::string keyword = from_python<std::string>(PyTuple_GET_ITEM(keywords, k));
    size_t i = 0;
    while (i < size && keyword != names[i]) ++i;
    if (i == size) throw TypeError("there is no argument '" + keyword + "'");
    if (ordered[i]) throw TypeError("got the argument '" + keyword + "' twice");
    ordered[i] = args[count + k];
  }
}

void refuse_missing(const char* name) { throw TypeError("expected the argument '" + std::string(name) + "'"); }

}  // namespace dlk::python
