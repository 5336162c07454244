// The events of the journal as Python sees them: plain tuples. Only the door includes this.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "journal.h"

namespace hybridcache {

namespace py = pybind11;

inline py::array_t<Token> tokens_of(const Event& event) {
  return py::array_t<Token>(static_cast<py::ssize_t>(event.tokens.size()), event.tokens.data());
}

inline py::dict contents_of(const Event& event) {
  py::dict out;
  for (const auto& each : event.contents) out[py::int_(each.position)] = py::bytes(each.content);
  return out;
}

// Its place in Event::What, and the fields of the class in values.py that has this place in EVENTS.
inline py::tuple to_tuple(const Event& event) {
  const auto what = static_cast<int>(event.what);
  switch (event.what) {
    case Event::What::pages_stored:
      return py::make_tuple(what, py::bytes(event.salt), event.before, event.pages, tokens_of(event),
                            contents_of(event));
    case Event::What::pages_removed:
      return py::make_tuple(what, event.pages);
    case Event::What::checkpoint_stored:
      return py::make_tuple(what, py::bytes(event.salt), event.before, event.slot, event.position, tokens_of(event),
                            contents_of(event));
    case Event::What::checkpoint_removed:
      return py::make_tuple(what, event.slot);
    case Event::What::cleared:
      break;
  }
  return py::make_tuple(what);
}

}  // namespace hybridcache
