// The Python face of the core: arguments in, plain values out, no logic. Tokens are read where they lie: int32 buffers
// without a copy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>

#include "cache.h"

namespace py = pybind11;
using namespace hybridcache;

namespace {

struct Lock {
  std::atomic_flag busy;
  bool broken = false;
};

// One thread at a time, no way back in from a callback, and none after a change that broke off half-way: what is then
// in the cache must not be served.
class Door {
 public:
  explicit Door(Lock& lock) : lock_(lock) {
    if (lock_.busy.test_and_set())
      throw ConcurrencyError("cache: another call is inside, expected one thread at a time");
    if (!lock_.broken) return;
    lock_.busy.clear();
    throw InvariantError(
        "cache: an earlier call broke off in the middle of a change; expected a new cache in its place");
  }
  ~Door() { lock_.busy.clear(); }
  Door(const Door&) = delete;

  // Runs a call that changes the cache. A caller's mistake is raised before anything changed; whatever else is raised
  // (out of memory, a broken invariant) leaves the cache closed to all further calls.
  template <class Call>
  auto change(Call call) {
    try {
      return call();
    } catch (const std::invalid_argument&) {
      throw;
    } catch (const StateError&) {
      throw;
    } catch (...) {
      lock_.broken = true;
      throw;
    }
  }

 private:
  Lock& lock_;
};

// A read-only view of the caller's tokens, valid while it lives.
class Tokens {
 public:
  Tokens(py::handle source, const char* name) : name_(name) {
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
  [[noreturn]] void refuse_value(std::int64_t value, std::size_t at) const {
    throw py::value_error(name_ + ": " + std::to_string(value) + " at index " + std::to_string(at) +
                          ", expected 0 <= token < 2**31");
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
        check(span_);
      } else {
        narrow({static_cast<const std::int64_t*>(view_.buf), count});
      }
    } catch (...) {
      PyBuffer_Release(&view_);
      held_ = false;
      throw;
    }
  }

  void check(std::span<const Token> tokens) const {
    Token signs = 0;  // one vectorised pass; which one it was is looked up only for the message
    for (const Token token : tokens) signs |= token;
    if (signs >= 0) return;
    const auto bad = std::find_if(tokens.begin(), tokens.end(), [](Token token) { return token < 0; });
    refuse_value(*bad, bad - tokens.begin());
  }

  void narrow(std::span<const std::int64_t> wide) {
    copy_.resize(wide.size());
    std::int64_t high = 0;
    for (std::size_t i = 0; i < wide.size(); ++i) {
      copy_[i] = static_cast<Token>(wide[i]);
      high |= wide[i];
    }
    if ((high & ~std::int64_t{INT32_MAX}) != 0) {
      const auto bad =
          std::find_if(wide.begin(), wide.end(), [](std::int64_t token) { return token < 0 || token > INT32_MAX; });
      refuse_value(*bad, bad - wide.begin());
    }
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
  Py_buffer view_{};
  bool held_ = false;
  std::vector<Token> copy_;
  std::span<const Token> span_;
};

using Contents = std::vector<std::pair<Position, py::bytes>>;

Prompt make_prompt(const Tokens& tokens, const py::bytes& salt, const Contents& contents) {
  Prompt prompt{tokens.span(), salt, {}};
  for (const auto& [position, content] : contents) prompt.content_keys.push_back({position, content});
  return prompt;
}

template <class T>
py::array_t<T> array(std::span<const T> values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<std::int32_t> pairs(const std::vector<Copy>& copies) {
  py::array_t<std::int32_t> out({static_cast<py::ssize_t>(copies.size()), py::ssize_t{2}});
  std::copy_n(reinterpret_cast<const std::int32_t*>(copies.data()), 2 * copies.size(), out.mutable_data());
  return out;
}

py::tuple to_tuple(const Match& match) {
  return py::make_tuple(match.length, match.kv_length, name(match.reason), match.ways > 0);
}

py::list inner(const Step& step) {
  py::list out;
  for (const auto& each : step.checkpoints) out.append(py::make_tuple(each.position, each.slot));
  return out;
}

py::tuple to_tuple(const std::vector<std::optional<Step>>& steps) {
  const auto count = static_cast<py::ssize_t>(steps.size());
  py::array_t<bool> ready(count);
  py::array_t<Position> begin(count), end(count);
  py::array_t<SlotId> read(count), write(count);
  py::list checkpoints;
  static const Step kNoRoom;
  for (py::ssize_t i = 0; i < count; ++i) {
    const Step& step = steps[i] ? *steps[i] : kNoRoom;
    ready.mutable_at(i) = steps[i].has_value();
    begin.mutable_at(i) = step.begin;
    end.mutable_at(i) = step.end;
    read.mutable_at(i) = step.read_slot;
    write.mutable_at(i) = step.write_slot;
    for (const auto& each : step.checkpoints) checkpoints.append(py::make_tuple(i, each.position, each.slot));
  }
  return py::make_tuple(ready, begin, end, read, write, checkpoints);
}

py::tuple to_tuple(const Plan& plan) {
  return py::make_tuple(plan.number, pairs(plan.copy_slots), array(std::span(plan.zero_slots)), pairs(plan.copy_pages),
                        array(std::span(plan.zero_pages)));
}

constexpr std::size_t kLong = 16384;  // tokens from which the pass over them is worth releasing the interpreter

template <class Call>
auto released(const Tokens& view, Call call) {
  if (view.span().size() < kLong) return call();
  const py::gil_scoped_release release;
  return call();
}

// The core behind its door. Every method takes the door, but stats() and arena(), which any thread may read.
class Core {
 public:
  explicit Core(const Options& options) : cache_(options) {}

  py::tuple match(py::handle tokens, const py::bytes& salt, const Contents& contents) {
    Door door(lock_);
    const Tokens view(tokens, "tokens");
    const auto prompt = make_prompt(view, salt, contents);
    return to_tuple(released(view, [&] { return cache_.match(prompt); }));
  }

  std::optional<LeaseId> reserve(py::handle tokens, const py::bytes& salt, const std::vector<Position>& breakpoints,
                                 const Contents& contents, Position max_new_tokens) {
    Door door(lock_);
    const Tokens view(tokens, "tokens");
    const auto prompt = make_prompt(view, salt, contents);
    const ReserveOptions options{breakpoints, max_new_tokens};
    return door.change([&] { return released(view, [&] { return cache_.reserve(prompt, options); }); });
  }

  std::optional<py::tuple> launch_one(LeaseId id, Position count) {
    Door door(lock_);
    return door.change([&]() -> std::optional<py::tuple> {
      const auto steps = cache_.launch(std::span(&id, 1), std::span(&count, 1));
      const auto& step = steps.front();
      if (!step) return std::nullopt;
      return py::make_tuple(step->begin, step->end, step->read_slot, step->write_slot, inner(*step));
    });
  }

  py::tuple launch(const std::vector<LeaseId>& ids, const std::vector<Position>& counts) {
    Door door(lock_);
    return door.change([&] { return to_tuple(cache_.launch(ids, counts)); });
  }

  py::tuple plan() {
    Door door(lock_);
    return door.change([&] { return to_tuple(cache_.collect()); });
  }

  void applied(std::int64_t number) {
    Door door(lock_);
    door.change([&] { cache_.applied(number); });
  }

  void commit(const std::vector<LeaseId>& ids, py::handle tokens) {
    Door door(lock_);
    const Tokens view(tokens, "tokens");
    door.change([&] { cache_.commit(ids, view.span()); });
  }

  std::optional<LeaseId> fork(LeaseId id) {
    Door door(lock_);
    return door.change([&] { return cache_.fork(id); });
  }

  void close(LeaseId id, int keep, bool discard) {
    Door door(lock_);
    door.change([&] { cache_.close(id, static_cast<Keep>(keep), discard); });
  }

  py::tuple lease(LeaseId id) {
    Door door(lock_);
    const Lease& lease = cache_.lease(id);
    return py::make_tuple(lease.course.start, lease.committed, lease.computed,
                          lease.capacity(cache_.options().page_size), lease.course.prompt_length, lease.course.boundary,
                          lease.extra_passes, lease.live, to_tuple(lease.match));
  }

  py::array_t<PageId> pages(LeaseId id) {
    Door door(lock_);
    return array(std::span(cache_.lease(id).pages));
  }

  std::optional<std::pair<PinId, Position>> pin(py::handle tokens, const py::bytes& salt, const Contents& contents) {
    Door door(lock_);
    const Tokens view(tokens, "tokens");
    const auto prompt = make_prompt(view, salt, contents);
    const auto id = door.change([&] { return cache_.pin(prompt); });
    if (!id) return std::nullopt;
    return std::pair(*id, cache_.pinned_length(*id));
  }

  void release(PinId id) {
    Door door(lock_);
    door.change([&] { cache_.release(id); });
  }

  std::int64_t clear(const std::optional<py::bytes>& salt) {
    Door door(lock_);
    const auto which = salt ? std::optional<std::string>(*salt) : std::nullopt;
    return door.change([&] { return cache_.clear(which); });
  }

  void check() {
    Door door(lock_);
    cache_.check();
  }

  std::string dump() {
    Door door(lock_);
    return cache_.dump();
  }

  std::uint64_t digest() {
    Door door(lock_);
    return cache_.digest();
  }

  std::vector<std::pair<std::string, std::int64_t>> stats() const { return cache_.stats(); }

  py::tuple arena() const {
    const Arena& arena = cache_.arena();
    return py::make_tuple(arena.pages_per_slab(), arena.num_pages(), arena.num_slots());
  }

 private:
  Cache cache_;
  Lock lock_;
};

}  // namespace

PYBIND11_MODULE(_core, module) {
  // The first array of a process imports numpy, which may be interrupted: not in the middle of a change.
  py::array_t<std::int32_t>(0);

  module.doc() = "The logical half of hybridcache. Use hybridcache.HybridCache.";
  py::register_exception<StateError>(module, "StateError", PyExc_RuntimeError);
  py::register_exception<ConcurrencyError>(module, "ConcurrencyError", PyExc_RuntimeError);
  py::register_exception<InvariantError>(module, "InvariantError", PyExc_AssertionError);

  py::class_<Options>(module, "Options")
      .def(py::init<>())
      .def_readwrite("page_size", &Options::page_size)
      .def_readwrite("page_bytes", &Options::page_bytes)
      .def_readwrite("slot_bytes", &Options::slot_bytes)
      .def_readwrite("num_slabs", &Options::num_slabs)
      .def_readwrite("num_pages", &Options::num_pages)
      .def_readwrite("num_slots", &Options::num_slots)
      .def_readwrite("max_cached_bytes", &Options::max_cached_bytes)
      .def_readwrite("alignment", &Options::alignment)
      .def_readwrite("pass_cost", &Options::pass_cost)
      .def_readwrite("interior_spacing", &Options::interior_spacing)
      .def_readwrite("run_ahead", &Options::run_ahead)
      .def_readwrite("inner_checkpoints", &Options::inner_checkpoints)
      .def_property(
          "lru", [](const Options& options) { return options.policy == Policy::lru; },
          [](Options& options, bool lru) { options.policy = lru ? Policy::lru : Policy::standard; });

  py::class_<Core>(module, "Core")
      .def(py::init<const Options&>(), py::arg("options"))
      .def("match", &Core::match, py::arg("tokens"), py::arg("salt"), py::arg("content_keys"))
      .def("reserve", &Core::reserve, py::arg("tokens"), py::arg("salt"), py::arg("breakpoints"),
           py::arg("content_keys"), py::arg("max_new_tokens"))
      .def("launch_one", &Core::launch_one, py::arg("lease"), py::arg("count"))
      .def("launch", &Core::launch, py::arg("leases"), py::arg("counts"))
      .def("plan", &Core::plan)
      .def("applied", &Core::applied, py::arg("number"))
      .def("commit", &Core::commit, py::arg("leases"), py::arg("tokens"))
      .def("fork", &Core::fork, py::arg("lease"))
      .def("close", &Core::close, py::arg("lease"), py::arg("keep"), py::arg("discard"))
      .def("lease", &Core::lease, py::arg("lease"))
      .def("pages", &Core::pages, py::arg("lease"))
      .def("pin", &Core::pin, py::arg("tokens"), py::arg("salt"), py::arg("content_keys"))
      .def("release", &Core::release, py::arg("pin"))
      .def("clear", &Core::clear, py::arg("salt"))
      .def("check", &Core::check)
      .def("dump", &Core::dump)
      .def("digest", &Core::digest)
      .def("stats", &Core::stats)
      .def("arena", &Core::arena);
}
