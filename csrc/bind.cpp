// The Python face of the core: arguments in, plain values out, no logic. Tokens are read where they lie: int32 buffers
// without a copy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "cache.h"
#include "door.h"
#include "event_values.h"
#include "match_values.h"
#include "tokens.h"

namespace py = pybind11;
using namespace hybridcache;

namespace {

using Contents = std::vector<std::pair<Position, py::bytes>>;

std::vector<ContentKey> content_keys(const Contents& contents) {
  std::vector<ContentKey> keys;
  for (const auto& [position, content] : contents) keys.push_back({position, content});
  return keys;
}

Prompt make_prompt(const Tokens& tokens, const py::bytes& salt, const Contents& contents) {
  return {tokens.span(), salt, content_keys(contents)};
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

py::list inner(const Step& step) {
  py::list out;
  for (const auto& each : step.checkpoints) out.append(py::make_tuple(each.position, each.slot));
  return out;
}

// read_slots and write_slots of a step: one each, but for a verify step.
py::list slots(const std::vector<SlotId>& several, SlotId one) {
  py::list out;
  for (const SlotId slot : several) out.append(slot);
  if (several.empty()) out.append(one);
  return out;
}

py::tuple to_tuple(const Step& step) {
  return py::make_tuple(step.begin, step.end, step.read_slot, step.write_slot, inner(step), step.begin_max,
                        slots(step.candidates, step.read_slot), slots(step.rows, step.write_slot));
}

// One row of a [batch, columns] array, padded with kNone.
void fill_row(SlotId* row, py::ssize_t columns, const std::vector<SlotId>& several, SlotId one) {
  std::fill(row, row + columns, kNone);
  *row = one;
  std::copy(several.begin(), several.end(), row);
}

py::tuple to_tuple(std::span<const std::optional<Step>> steps, std::int64_t draft_tokens) {
  const auto count = static_cast<py::ssize_t>(steps.size());
  const auto columns = static_cast<py::ssize_t>(draft_tokens + 1);
  py::array_t<bool> ready(count);
  py::array_t<Position> begin(count), end(count), begin_max(count);
  py::array_t<SlotId> read(count), write(count), candidates({count, columns}), rows({count, columns});
  py::list checkpoints;
  const auto ready_at = ready.mutable_data();
  const auto begin_at = begin.mutable_data(), end_at = end.mutable_data(), begin_max_at = begin_max.mutable_data();
  const auto read_at = read.mutable_data(), write_at = write.mutable_data();
  const auto candidates_at = candidates.mutable_data(), rows_at = rows.mutable_data();
  static const Step kNoRoom;
  for (py::ssize_t i = 0; i < count; ++i) {
    const Step& step = steps[i] ? *steps[i] : kNoRoom;
    ready_at[i] = steps[i].has_value();
    begin_at[i] = step.begin;
    end_at[i] = step.end;
    begin_max_at[i] = step.begin_max;
    read_at[i] = step.read_slot;
    write_at[i] = step.write_slot;
    fill_row(candidates_at + i * columns, columns, step.candidates, step.read_slot);
    fill_row(rows_at + i * columns, columns, step.rows, step.write_slot);
    for (const auto& each : step.checkpoints) checkpoints.append(py::make_tuple(i, each.position, each.slot));
  }
  return py::make_tuple(ready, begin, end, read, write, checkpoints, begin_max, candidates, rows);
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

// The core behind its door. Every method takes the door, but stats(), times() and arena(), which any thread may read.
class Core {
 public:
  explicit Core(const Options& options) : cache_(options) {}

  py::tuple match(py::handle tokens, const py::bytes& salt, const Contents& contents) {
    TimedDoor door(lock_, Operation::match);
    const Tokens view(tokens, "tokens", false);
    const auto prompt = make_prompt(view, salt, contents);
    return to_tuple(released(view, [&] { return cache_.match(prompt); }));
  }

  std::optional<LeaseId> reserve(py::handle tokens, const py::bytes& salt, const Contents& contents,
                                 const std::vector<Position>& breakpoints, Position max_new_tokens, std::int64_t now,
                                 int priority) {
    TimedDoor door(lock_, Operation::reserve);
    const Tokens view(tokens, "tokens", false);
    const auto prompt = make_prompt(view, salt, contents);
    const ReserveOptions options{breakpoints, max_new_tokens, now, priority};
    return door.change([&] { return released(view, [&] { return cache_.reserve(prompt, options); }); });
  }

  TranscriptId transcript(const py::bytes& salt) {
    TimedDoor door(lock_, Operation::transcript);
    return door.change([&] { return cache_.open_transcript(salt); });
  }

  Position extend(TranscriptId id, py::handle tokens, const Contents& contents) {
    TimedDoor door(lock_, Operation::extend);
    const Tokens view(tokens, "tokens");
    const auto keys = content_keys(contents);
    door.change([&] { cache_.extend(id, view.span(), keys); });
    return std::ssize(cache_.transcript(id).tokens);
  }

  Position truncate(TranscriptId id, Position length) {
    TimedDoor door(lock_, Operation::truncate);
    door.change([&] { cache_.truncate(id, length); });
    return length;
  }

  py::array_t<Token> transcript_tokens(TranscriptId id) {
    Door door(lock_);
    return array(std::span<const Token>(cache_.plain_tokens(id)));
  }

  void close_transcript(TranscriptId id) {
    TimedDoor door(lock_, Operation::close_transcript);
    door.change([&] { cache_.close_transcript(id); });
  }

  py::tuple match_transcript(TranscriptId id) {
    TimedDoor door(lock_, Operation::match);
    return to_tuple(cache_.match(cache_.prompt(id)));
  }

  std::optional<LeaseId> reserve_transcript(TranscriptId id, const std::vector<Position>& breakpoints,
                                            Position max_new_tokens, std::int64_t now, int priority) {
    TimedDoor door(lock_, Operation::reserve);
    const ReserveOptions options{breakpoints, max_new_tokens, now, priority};
    return door.change([&] { return cache_.reserve(cache_.prompt(id), options); });
  }

  std::optional<py::tuple> launch_one(LeaseId id, Position count, std::int64_t rows) {
    TimedDoor door(lock_, Operation::launch);
    return door.change([&]() -> std::optional<py::tuple> {
      const auto steps = cache_.launch(std::span(&id, 1), std::span(&count, 1), std::span(&rows, 1));
      return steps.front() ? std::optional(to_tuple(*steps.front())) : std::nullopt;
    });
  }

  py::tuple launch(const std::vector<LeaseId>& ids, const std::vector<Position>& counts,
                   const std::vector<std::int64_t>& rows) {
    TimedDoor door(lock_, Operation::launch);
    return door.change([&] { return to_tuple(cache_.launch(ids, counts, rows), cache_.options().draft_tokens); });
  }

  py::tuple plan() {
    TimedDoor door(lock_, Operation::plan);
    return door.change([&] { return to_tuple(cache_.collect()); });
  }

  void applied(std::int64_t number) {
    TimedDoor door(lock_, Operation::applied);
    door.change([&] { cache_.applied(number); });
  }

  void commit_one(LeaseId id, py::handle tokens) {
    TimedDoor door(lock_, Operation::commit);
    const Tokens view(tokens, "tokens");
    const auto count = static_cast<std::int64_t>(view.span().size());
    door.change([&] { cache_.commit(std::span(&id, 1), view.span(), std::span(&count, 1)); });
  }

  void commit(const std::vector<LeaseId>& ids, py::handle tokens,
              const std::optional<std::vector<std::int64_t>>& counts) {
    TimedDoor door(lock_, Operation::commit);
    const Tokens view(tokens, "tokens");
    door.change([&] { cache_.commit(ids, view.span(), counts); });
  }

  void want(LeaseId id, Position position) {
    TimedDoor door(lock_, Operation::want);
    door.change([&] { cache_.want(id, position); });
  }

  std::optional<LeaseId> fork(LeaseId id) {
    TimedDoor door(lock_, Operation::fork);
    return door.change([&] { return cache_.fork(id); });
  }

  void close(LeaseId id, int keep, bool discard, std::int64_t now, std::int64_t expected_return) {
    TimedDoor door(lock_, Operation::close);
    door.change([&] { cache_.close(id, static_cast<Keep>(keep), discard, now, expected_return); });
  }

  py::tuple lease(LeaseId id) {
    Door door(lock_);
    const Lease& lease = cache_.lease(id);
    return py::make_tuple(lease.course.start, lease.committed, lease.computed,
                          lease.capacity(cache_.options().paging.page_size), lease.course.prompt_length,
                          lease.course.boundary, lease.extra_passes, lease.live);
  }

  py::tuple lease_match(LeaseId id) {
    Door door(lock_);
    return to_tuple(cache_.lease(id).match);
  }

  py::array_t<PageId> pages(LeaseId id) {
    Door door(lock_);
    auto shared = std::make_unique<std::shared_ptr<const PageTable::Pages>>(cache_.lease(id).pages.share());
    const auto& pages = **shared;
    const auto size = static_cast<py::ssize_t>(pages.size());
    const PageId* data = pages.data();
    const py::capsule owner(shared.release(),
                            [](void* held) { delete static_cast<std::shared_ptr<const PageTable::Pages>*>(held); });
    py::array_t<PageId> view(size, data, owner);
    view.attr("flags").attr("writeable") = false;
    return view;
  }

  std::optional<std::pair<PinId, Position>> pin(py::handle tokens, const py::bytes& salt, const Contents& contents) {
    TimedDoor door(lock_, Operation::pin);
    const Tokens view(tokens, "tokens", false);
    const auto prompt = make_prompt(view, salt, contents);
    const auto id = door.change([&] { return cache_.pin(prompt); });
    if (!id) return std::nullopt;
    return std::pair(*id, cache_.pinned_length(*id));
  }

  void release(PinId id) {
    TimedDoor door(lock_, Operation::release);
    door.change([&] { cache_.release(id); });
  }

  std::int64_t clear(const std::optional<py::bytes>& salt) {
    TimedDoor door(lock_, Operation::clear);
    const auto which = salt ? std::optional<std::string>(*salt) : std::nullopt;
    return door.change([&] { return cache_.clear(which); });
  }

  py::list take_events() {
    TimedDoor door(lock_, Operation::take_events);
    py::list out;
    for (const auto& event : cache_.events()) out.append(to_tuple(event));
    cache_.drop_events();  // now that all of them are handed over
    return out;
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

  // (calls, nanoseconds) by operation.
  py::dict times() const {
    py::dict out;
    for (int i = 0; i < kOperations; ++i)
      out[kOperationNames[i]] = py::make_tuple(lock_.times.calls(i), lock_.times.nanoseconds(i));
    return out;
  }

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
      .def_property(
          "page_size", [](const Options& options) { return options.paging.page_size; },
          [](Options& options, std::int64_t page_size) { options.paging.page_size = page_size; })
      .def_property(
          "lookahead", [](const Options& options) { return options.paging.lookahead; },
          [](Options& options, std::int64_t lookahead) { options.paging.lookahead = lookahead; })
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
      .def_readwrite("draft_tokens", &Options::draft_tokens)
      .def_readwrite("inner_checkpoints", &Options::inner_checkpoints)
      .def_readwrite("events", &Options::events)
      .def_readwrite("event_capacity", &Options::event_capacity)
      .def_readwrite("small_part", &Options::small_part)
      .def_readwrite("marconi_alpha", &Options::marconi_alpha)
      .def_readwrite("without", &Options::without)
      .def_property(
          "policy", [](const Options& options) { return static_cast<int>(options.policy); },
          [](Options& options, int policy) { options.policy = static_cast<Policy>(policy); });

  py::class_<Core>(module, "Core")
      .def(py::init<const Options&>(), py::arg("options"))
      .def("match", &Core::match, py::arg("tokens"), py::arg("salt"), py::arg("content_keys"))
      .def("reserve", &Core::reserve, py::arg("tokens"), py::arg("salt"), py::arg("content_keys"),
           py::arg("breakpoints"), py::arg("max_new_tokens"), py::arg("now"), py::arg("priority"))
      .def("transcript", &Core::transcript, py::arg("salt"))
      .def("extend", &Core::extend, py::arg("transcript"), py::arg("tokens"), py::arg("content_keys"))
      .def("truncate", &Core::truncate, py::arg("transcript"), py::arg("length"))
      .def("transcript_tokens", &Core::transcript_tokens, py::arg("transcript"))
      .def("close_transcript", &Core::close_transcript, py::arg("transcript"))
      .def("match_transcript", &Core::match_transcript, py::arg("transcript"))
      .def("reserve_transcript", &Core::reserve_transcript, py::arg("transcript"), py::arg("breakpoints"),
           py::arg("max_new_tokens"), py::arg("now"), py::arg("priority"))
      .def("launch_one", &Core::launch_one, py::arg("lease"), py::arg("count"), py::arg("rows"))
      .def("launch", &Core::launch, py::arg("leases"), py::arg("counts"), py::arg("rows"))
      .def("plan", &Core::plan)
      .def("applied", &Core::applied, py::arg("number"))
      .def("commit_one", &Core::commit_one, py::arg("lease"), py::arg("tokens"))
      .def("commit", &Core::commit, py::arg("leases"), py::arg("tokens"), py::arg("counts"))
      .def("want", &Core::want, py::arg("lease"), py::arg("position"))
      .def("fork", &Core::fork, py::arg("lease"))
      .def("close", &Core::close, py::arg("lease"), py::arg("keep") = static_cast<int>(Keep::all),
           py::arg("discard") = false, py::arg("now") = -1, py::arg("expected_return") = -1)
      .def("lease", &Core::lease, py::arg("lease"))
      .def("lease_match", &Core::lease_match, py::arg("lease"))
      .def("pages", &Core::pages, py::arg("lease"))
      .def("pin", &Core::pin, py::arg("tokens"), py::arg("salt"), py::arg("content_keys"))
      .def("release", &Core::release, py::arg("pin"))
      .def("clear", &Core::clear, py::arg("salt"))
      .def("take_events", &Core::take_events)
      .def("check", &Core::check)
      .def("dump", &Core::dump)
      .def("digest", &Core::digest)
      .def("stats", &Core::stats)
      .def("times", &Core::times)
      .def("arena", &Core::arena);
}
