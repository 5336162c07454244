// The ops: each reads its operands, whatever else is the case, and then makes its calls if they are possible.
#include "walk.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <utility>

namespace fuzz {

namespace {
constexpr std::size_t kMostPins = 3;
constexpr Position kTooMany = 1 << 20;
}  // namespace

void Unchanged::verify(const Cache& cache, const std::string& what, const std::string& counter) const {
  auto stats = cache.stats();
  for (std::size_t i = 0; i < stats.size(); ++i) {
    if (stats[i].first != counter && stats[i] != stats_[i]) throw Finding(what + ": changed " + stats[i].first);
  }
  if (cache.digest() != digest_) throw Finding(what + ": changed the digest");
  if (cache.dump() != dump_) throw Finding(what + ": changed the tree\n" + dump_ + "--- now\n" + cache.dump());
}

const std::array<Walk::Op, 40> Walk::kOps = {&Walk::reserve,
                                             &Walk::reserve,
                                             &Walk::reserve,
                                             &Walk::reserve,
                                             &Walk::reserve,
                                             &Walk::launch,
                                             &Walk::launch,
                                             &Walk::launch,
                                             &Walk::plan,
                                             &Walk::plan,
                                             &Walk::want,
                                             &Walk::apply,
                                             &Walk::apply,
                                             &Walk::apply,
                                             &Walk::commit,
                                             &Walk::commit,
                                             &Walk::commit,
                                             &Walk::launch_batch,
                                             &Walk::launch_batch,
                                             &Walk::commit_batch,
                                             &Walk::commit_batch,
                                             &Walk::turn,
                                             &Walk::turn,
                                             &Walk::overlap,
                                             &Walk::fork,
                                             &Walk::close,
                                             &Walk::close,
                                             &Walk::match,
                                             &Walk::pin,
                                             &Walk::release,
                                             &Walk::rare,
                                             &Walk::bad_call,
                                             &Walk::open_session,
                                             &Walk::extend_session,
                                             &Walk::extend_session,
                                             &Walk::truncate_session,
                                             &Walk::match_session,
                                             &Walk::reserve_session,
                                             &Walk::reserve_session,
                                             &Walk::close_session};

Walk::Walk(std::span<const std::uint8_t> input, bool trace)
    : input_(input), setup_(read_setup(input_)), trace_(trace), cache_(setup_.options) {
  cache_.check();
}

bool Walk::next() {
  if (!input_.more()) return false;
  (this->*kOps[input_.byte() % kOps.size()])();
  return true;
}

void Walk::checked(const char* call) {
  cache_.check();
  if (trace_)
    std::fprintf(stderr, "%-14s digest %016llx\n%s", call, static_cast<unsigned long long>(cache_.digest()),
                 cache_.dump().c_str());
}

// ---------------------------------------------------------------- requests come in

void Walk::match() {
  const Ask ask(path());
  const Unchanged before(cache_);
  const auto match = cache_.match(ask.prompt());
  before.verify(cache_, "match");
  const auto length = static_cast<Position>(ask.prompt().tokens.size());
  if (match.length > std::min(match.kv_length, length - 1) || match.kv_length > length)
    throw Finding("match: longer than the prompt");
  checked("match");
}

// The operands of a reserve beside its prompt.
ReserveOptions Walk::reserve_options(Position length) {
  const int extras = input_.byte();
  std::vector<int> places;
  for (int i = 0; i < extras % 4; ++i) places.push_back(input_.byte());
  const Position max_new = extras & 4 ? input_.byte() % 24 : 0;
  std::set<Position> breakpoints;
  for (const int place : places) {
    if (length + max_new > 0) breakpoints.insert(1 + place % (length + max_new));
  }
  return {{breakpoints.begin(), breakpoints.end()}, max_new};
}

void Walk::reserve() {
  const Path asked = path();
  const auto options = reserve_options(std::ssize(asked.symbols));
  if (flights_.size() == kMostFlights) return;
  const Ask ask(asked);
  reserved(asked, options, [&] { return cache_.reserve(ask.prompt(), options); });
}

void Walk::reserved(const Path& asked, const ReserveOptions& options,
                    const std::function<std::optional<LeaseId>()>& reserve) {
  paths_.push_back(asked);
  if (!fits(std::ssize(asked.symbols) + options.max_new_tokens)) return refused("reserve: too large", reserve);
  const Unchanged before(cache_);
  if (const auto id = reserve()) {
    flights_.push_back({*id, asked, {}});
  } else {
    before.verify(cache_, "reserve: no room", "refused_reserves");
  }
  checked("reserve");
}

void Walk::fork() {
  const int which = input_.byte();
  const auto found = those(&Walk::may_fork);
  if (found.empty() || flights_.size() == kMostFlights) return;
  const Flight parent = flights_[found[which % found.size()]];
  const Unchanged before(cache_);
  if (const auto id = cache_.fork(parent.id)) {
    flights_.push_back({*id, parent.path, {}});
  } else {
    before.verify(cache_, "fork: no room");
  }
  checked("fork");
}

// ---------------------------------------------------------------- steps

void Walk::launched(Flight& flight, const Step& step, int seed) {
  Running& running = flight.steps.emplace_back();
  running.rows = static_cast<Position>(step.rows.size());
  const auto from = step.verifies() ? step.begin : std::max(step.begin, cache_.lease(flight.id).course.prompt_length);
  for (Position i = 0; i < step.end - from; ++i) running.feed.push_back(token(i, seed));
  const auto length = static_cast<Position>(running.feed.size());
  const Position stay = seed & 8 ? 1 + (seed >> 4) : length;
  running.stays = std::max(std::min(stay, length), running.least());
  running.fails = step.verifies() && stay < running.least();
}

void Walk::launch() {
  const int which = input_.byte(), size = input_.byte(), seed = input_.byte();
  const auto found = those(&Walk::would_launch);
  if (found.empty()) return;
  Flight& flight = flights_[found[which % 8 % found.size()]];
  const Position tokens = size == 255 ? kTooMany : count(flight, size);
  const Shape shape{tokens, rows(flight, tokens, which >> 3)};
  const auto launch = [&] {
    return cache_.launch(std::span(&flight.id, 1), std::span(&shape.count, 1), std::span(&shape.rows, 1)).front();
  };
  if (is_mistake(flight, shape)) return refused("launch: a mistake", launch);
  const Unchanged before(cache_);
  if (const auto step = launch()) {
    launched(flight, *step, seed);
  } else {
    before.verify(cache_, "launch: no room", "refused_launches");
  }
  checked("launch");
}

void Walk::launch_all(const std::vector<std::size_t>& chosen, int size, int seed, int how) {
  std::vector<LeaseId> ids;
  std::vector<Position> counts, asked;
  bool mistake = false;
  for (const auto index : chosen) {
    const Flight& flight = flights_[index];
    const auto number = static_cast<int>(ids.size());
    const Position tokens = count(flight, (size + 37 * number) % 256);
    Shape shape{tokens, rows(flight, tokens, (how + 5 * number) % 32)};
    if (seed % 16 != 15 && is_mistake(flight, shape)) shape = {1, Cache::kDefaultRows};
    mistake |= is_mistake(flight, shape);
    ids.push_back(flight.id);
    counts.push_back(shape.count);
    asked.push_back(shape.rows);
  }
  if (ids.empty()) return;
  if (mistake) return refused("launch of a batch: a mistake", [&] { cache_.launch(ids, counts, asked); });
  const Unchanged before(cache_);
  const auto steps = cache_.launch(ids, counts, asked);
  bool any = false;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (steps[i]) launched(flights_[chosen[i]], *steps[i], seed);
    any |= steps[i].has_value();
  }
  if (!any) before.verify(cache_, "launch of a batch: no room", "refused_launches");
  checked("launch_batch");
}

void Walk::launch_batch() {
  const int which = input_.byte(), size = input_.byte(), seed = input_.byte();
  auto found = those(&Walk::would_launch);
  if (found.empty()) return;
  found.erase(found.begin(), found.begin() + which % 8 % found.size());
  launch_all(found, size, seed, which >> 3);
}

void Walk::want_one(const Flight& flight, Position position) {
  const auto want = [&] { cache_.want(flight.id, position); };
  if (!may_want(flight, position)) return refused("want: no state there", want);
  want();
  checked("want");
}

void Walk::want() {
  const int which = input_.byte(), where = input_.byte();
  if (flights_.empty()) return;
  const Flight& flight = flights_[which % 8 % flights_.size()];
  const Position at = position(flight, where);
  for (const Flight& each : flights_) {
    if (&each == &flight || (which >= 128 && each.path == flight.path)) want_one(each, at);
  }
}

void Walk::collect() {
  if (!may_plan()) return;
  const auto plan = cache_.collect();
  if (plan.number != ++plans_) throw Finding("plan: a wrong number");
  pending_.push_back(plan.number);
  checked("plan");
}

void Walk::plan() {
  collect();
}

void Walk::apply_oldest() {
  applied_ = pending_.front();
  pending_.pop_front();
  cache_.applied(applied_);
  checked("applied");
}

void Walk::apply_stale() {
  if (applied_ == 0) return;
  const Unchanged before(cache_);
  cache_.applied(applied_);
  before.verify(cache_, "applied again");
}

void Walk::apply() {
  if (!pending_.empty()) apply_oldest();
}

namespace {
// How many tokens the engine commits: of a verify step what the device accepted, or it stops short of it.
Position kept(const Running& step, int& how) {
  if (step.rows == 0) return static_cast<Position>(step.feed.size());
  if (step.is_void || step.fails) return 0;
  const int chosen = how++ % 32;
  const auto fewer = 1 + step.stays - step.least();
  const auto short_of = (chosen >> 2) % fewer;
  return chosen % 4 != 3 ? step.stays : short_of == 0 ? 0 : step.least() + short_of - 1;
}
}  // namespace

void Walk::commit_all(const std::vector<std::size_t>& chosen, int how) {
  std::vector<LeaseId> ids;
  std::vector<Token> tokens;
  std::vector<std::int64_t> counts;
  bool told = how % 2;
  for (const auto index : chosen) {
    Flight& flight = flights_[index];
    const Running step = flight.steps.front();
    const auto stay = kept(step, how);
    ids.push_back(flight.id);
    counts.push_back(stay);
    for (Position i = 0; i < stay; ++i) {
      tokens.push_back(step.feed[i]);
      flight.path.symbols.push_back({step.feed[i]});
    }
    flight.steps.pop_front();
    told |= step.rows > 0;
    if (step.rows == 0 || flight.steps.empty()) continue;
    flight.steps.front().is_void = stay == 0 || stay < step.stays;
    flight.steps.front().must_be = stay == 0;
  }
  if (ids.empty()) return;
  cache_.commit(ids, tokens, told ? std::optional<std::span<const std::int64_t>>(counts) : std::nullopt);
  for (const auto index : chosen) verify_cursors(flights_[index]);
  checked("commit");
}

// `committed` is what was given, `computed` where the last open step ends at the latest.
void Walk::verify_cursors(const Flight& flight) const {
  const Lease& lease = cache_.lease(flight.id);
  const auto known = static_cast<Position>(flight.path.symbols.size());
  const auto last = lease.steps.empty() ? lease.committed : lease.steps.back().end;
  const auto spread = lease.steps.empty() ? 0 : lease.steps.back().begin_max - lease.steps.back().begin;
  if (std::max(lease.committed, lease.course.prompt_length) != known || lease.computed != last + spread)
    throw Finding("commit: wrong cursors\n" + cache_.dump());
}

void Walk::commit() {
  const int which = input_.byte();
  const auto found = those(&Walk::may_commit);
  if (!found.empty()) commit_all({found[which % 8 % found.size()]}, which >> 3);
}

void Walk::commit_batch() {
  const int which = input_.byte();
  auto found = those(&Walk::may_commit);
  if (found.empty()) return;
  found.erase(found.begin(), found.begin() + which % 8 % found.size());
  commit_all(found, which >> 3);
}

void Walk::turn() {
  const int size = input_.byte(), seed = input_.byte();
  apply_all();
  launch_all(those(&Walk::would_launch), size, seed, 0);
  collect();
  apply_all();
  commit_all(those(&Walk::may_commit), 0);
}

void Walk::overlap() {
  const int size = input_.byte(), seed = input_.byte(), how = input_.byte();
  launch_all(those(&Walk::would_launch), size, seed, how % 32);
  collect();
  apply_all();
  commit_all(those(&Walk::has_ended), how >> 3);
}

// ---------------------------------------------------------------- and go

void Walk::close_one(std::size_t index, Keep keep, bool discard) {
  const Flight flight = flights_[index];
  const auto committed = cache_.lease(flight.id).committed;
  flights_.erase(flights_.begin() + static_cast<std::ptrdiff_t>(index));
  if (committed > 0) {
    paths_.push_back(flight.path);
    paths_.back().symbols.resize(committed);
  }
  cache_.close(flight.id, keep, discard);
  closed_ = flight.id;
  checked("close");
}

void Walk::close() {
  const int which = input_.byte(), how = input_.byte();
  if (!flights_.empty()) close_one(which % flights_.size(), static_cast<Keep>(how % 3), how >= 192);
}

void Walk::pin() {
  const Ask ask(path());
  if (pins_.size() == kMostPins) return;
  if (const auto id = cache_.pin(ask.prompt())) {
    pins_.push_back(*id);
    if (cache_.pinned_length(*id) > static_cast<Position>(ask.prompt().tokens.size()))
      throw Finding("pin: beyond the prompt");
  }
  checked("pin");
}

void Walk::release() {
  const int which = input_.byte();
  if (pins_.empty()) return;
  const auto at = pins_.begin() + which % static_cast<std::ptrdiff_t>(pins_.size());
  cache_.release(*at);
  pins_.erase(at);
  checked("release");
}

void Walk::clear(int which) {
  const char* const salts[] = {"", "tenant"};
  cache_.clear(which == 0 ? std::nullopt : std::optional<std::string>(salts[which - 1]));
  checked("clear");
}

void Walk::close_all() {
  while (!flights_.empty()) close_one(0, Keep::all, false);
}

void Walk::apply_all() {
  while (!pending_.empty()) apply_oldest();
}

void Walk::release_all() {
  while (!pins_.empty()) {
    cache_.release(pins_.back());
    pins_.pop_back();
    checked("release");
  }
}

void Walk::rare() {
  const int what = input_.byte();
  switch (what % 3) {
    case 0:
      return clear(what / 3 % 3);
    case 1:
      return apply_stale();
    case 2:
      close_all();
      apply_all();
  }
}

void Walk::finish() {
  for (int shift = 0; shift < 8; shift += 2) {
    switch (setup_.finish >> shift & 3) {
      case 0:
        close_all();
        break;
      case 1:
        apply_all();
        break;
      case 2:
        release_all();
        break;
      case 3:
        clear(0);
    }
  }
}

// With no lease, plan and pin, what is left is the checkpoints, and clear() takes those: then nothing may be taken.
void Walk::verify_nothing_is_left() {
  if (!flights_.empty() || !pending_.empty() || !pins_.empty()) return;
  clear(0);
  for (const auto& [name, value] : cache_.stats()) {
    static const std::set<std::string> kGauges = {"open_leases", "resting_leases", "pins",
                                                  "nodes",       "checkpoints",    "tree_pages",
                                                  "taken_pages", "taken_slots",    "cached_bytes"};
    if (value != 0 && kGauges.contains(name)) throw Finding("at the end: " + name + " is not 0\n" + cache_.dump());
  }
}

}  // namespace fuzz
