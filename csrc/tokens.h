// Tokens as a caller hands them over: int32 buffers are read where they lie, int64 and lists are copied. Ids are
// checked here, so that the core may rely on it, but those of a prompt: most of it equals what the tree knows.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "types.h"

namespace hybridcache {

namespace py = pybind11;

// A read-only view of the caller's tokens, valid while it lives.
class Tokens {
 public:
  // `checked`: ids below 0 are refused here; else only those of an int64 buffer or of a list, the cache does the rest.
  Tokens(py::handle source, const char* name, bool checked = true) : name_(name), checked_(checked) {
    py::object holder = py::reinterpret_borrow<py::object>(source);
    if (!PyObject_CheckBuffer(holder.ptr()) && py::hasattr(holder, "data_ptr") && py::hasattr(holder, "numpy"))
      holder = from_tensor(holder);
    if (PyObject_CheckBuffer(holder.ptr())) {
      from_buffer(holder);
    } else {
      from_sequence(holder);
    }
  }
  ~Tokens() {
    if (held_) PyBuffer_Release(&view_);
  }
  Tokens(const Tokens&) = delete;
  std::span<const Token> span() const { return span_; }

 private:
  [[noreturn]] void refuse_type(const std::string& got) const {
    throw py::type_error(name_ + ": " + got + ", expected int32 or int64 in a buffer, or a list of ints");
  }

  py::object from_tensor(const py::object& tensor) const {
    try {
      return tensor.attr("numpy")();
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;
      refuse_type("a tensor that is not plain CPU memory (" + std::string(py::str(error.value())) + ")");
    }
  }

  void from_buffer(const py::object& buffer) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_FORMAT | PyBUF_STRIDES) != 0) throw py::error_already_set();
    held_ = true;
    std::string format = view_.format == nullptr ? "B" : view_.format;
    if (format.size() == 2 && std::string("@=<").find(format.front()) != std::string::npos) format.erase(0, 1);
    const bool is_integer = format.size() == 1 && std::string("ilq").find(format) != std::string::npos;
    try {
      if (!is_integer || (view_.itemsize != 4 && view_.itemsize != 8))
        refuse_type("a buffer of format '" + format + "'");
      if (view_.ndim != 1) throw py::value_error(name_ + ": " + std::to_string(view_.ndim) + " dimensions, expected 1");
      if (!PyBuffer_IsContiguous(&view_, 'C'))
        throw py::value_error(name_ + ": stride " + std::to_string(view_.strides[0]) +
                              " bytes, expected a contiguous buffer");
      const auto count = static_cast<std::size_t>(view_.shape[0]);
      if (view_.itemsize == 4) {
        span_ = {static_cast<const Token*>(view_.buf), count};
        if (checked_) check_ids(span_, name_);
      } else {
        narrow({static_cast<const std::int64_t*>(view_.buf), count});
      }
    } catch (...) {
      PyBuffer_Release(&view_);
      held_ = false;
      throw;
    }
  }

  void narrow(std::span<const std::int64_t> wide) {
    copy_.resize(wide.size());
    std::int64_t seen = 0;
    for (std::size_t i = 0; i < wide.size(); ++i) {
      copy_[i] = static_cast<Token>(wide[i]);
      seen |= wide[i];
    }
    if (is_no_id(seen)) refuse_ids(wide, name_);
    span_ = copy_;
  }

  void from_sequence(const py::object& sequence) {
    if (!PySequence_Check(sequence.ptr()) || PyUnicode_Check(sequence.ptr()))
      refuse_type("a " + std::string(Py_TYPE(sequence.ptr())->tp_name));
    // A tuple of its own: an element's __index__ may change the list under us.
    const auto items = py::reinterpret_steal<py::object>(PySequence_Tuple(sequence.ptr()));
    if (!items) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(items.ptr()));
    copy_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) copy_.push_back(one(PyTuple_GET_ITEM(items.ptr(), i), i));
    span_ = copy_;
  }

  Token one(PyObject* item, std::size_t at) const {
    if (PyBool_Check(item) || !PyIndex_Check(item))
      refuse_type("a " + std::string(Py_TYPE(item)->tp_name) + " at index " + std::to_string(at));
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(item));
    if (!number) throw py::error_already_set();
    int overflow = 0;
    const auto value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow != 0 || value < 0 || value > INT32_MAX) {
      throw py::value_error(name_ + ": " + std::string(py::str(number)) + " at index " + std::to_string(at) +
                            ", expected 0 <= token < 2**31");
    }
    return static_cast<Token>(value);
  }

  const std::string name_;
  const bool checked_;
  Py_buffer view_{};
  bool held_ = false;
  std::vector<Token> copy_;
  std::span<const Token> span_;
};

}  // namespace hybridcache
