// A match as Python sees it: plain tuples. Only the door includes this.
#pragma once

#include <pybind11/pybind11.h>

#include "types.h"

namespace hybridcache {

namespace py = pybind11;

// The fields of Missed in values.py.
inline py::object to_object(const std::optional<Missed>& missed) {
  if (!missed) return py::none();
  const py::object none = py::none();
  if (!missed->kind) return py::make_tuple(missed->position, none, name(missed->cause), none, none);
  const py::object time = missed->time_ago < 0 ? none : py::int_(missed->time_ago);
  return py::make_tuple(missed->position, name(*missed->kind), name(missed->cause), missed->requests_ago, time);
}

// Those of Match.
inline py::tuple to_tuple(const Match& match) {
  return py::make_tuple(match.length, match.kv_length, name(match.reason), match.ways > 0, to_object(match.missed));
}

}  // namespace hybridcache
