// Calls that a caller must not make: each must be refused, and change nothing (I6). What the Python face refuses before
// the core sees it (types, signs) is tested in tests/bad_calls.py.
#include <functional>
#include <utility>
#include <vector>

#include "walk.h"

namespace fuzz {

namespace {
constexpr Position kFar = Position{1} << 40;
using Mistakes = std::vector<std::pair<const char*, std::function<void()>>>;

void launch_them(Cache& cache, std::vector<LeaseId> ids, std::vector<Position> counts,
                 std::vector<std::int64_t> rows = {}) {
  cache.launch(ids, counts, rows);
}

using Counts = std::optional<std::vector<std::int64_t>>;

Counts counted(std::int64_t count) {
  return std::vector<std::int64_t>{count};
}

void commit_them(Cache& cache, std::vector<LeaseId> ids, std::vector<Token> tokens, Counts counts = std::nullopt) {
  cache.commit(ids, tokens, counts ? std::optional<std::span<const std::int64_t>>(*counts) : std::nullopt);
}

void add_arguments(Mistakes& to, Cache& cache) {
  static const std::vector<Token> three = {1, 2, 3};
  const auto ask = [](std::vector<ContentKey> keys) { return Prompt{three, "", std::move(keys)}; };
  to.emplace_back("match: no token", [&] { cache.match({}); });
  to.emplace_back("reserve: no token", [&] { cache.reserve({}, {}); });
  to.emplace_back("pin: no token", [&] { cache.pin({}); });
  to.emplace_back("reserve: more than the arena", [&, ask] { cache.reserve(ask({}), {{}, kFar}); });
  to.emplace_back("reserve: breakpoint 0", [&, ask] { cache.reserve(ask({}), {{1, 0}, 0}); });
  to.emplace_back("reserve: breakpoint beyond", [&, ask] { cache.reserve(ask({}), {{3, kFar}, 0}); });
  to.emplace_back("reserve: content beyond", [&, ask] { cache.reserve(ask({{0, "x"}, {3, "x"}}), {}); });
  to.emplace_back("match: content before", [&, ask] { cache.match(ask({{-1, "x"}})); });
  to.emplace_back("pin: content twice", [&, ask] { cache.pin(ask({{1, "x"}, {1, "y"}})); });
  to.emplace_back("launch: more counts than leases", [&] { launch_them(cache, {}, {1}); });
  to.emplace_back("launch: more rows than leases", [&] { launch_them(cache, {}, {}, {1}); });
  to.emplace_back("commit: more tokens than leases", [&] { commit_them(cache, {}, {1}); });
  to.emplace_back("commit: more counts than leases", [&] { commit_them(cache, {}, {}, counted(0)); });
}

void add_strangers(Mistakes& to, Cache& cache, LeaseId stranger) {
  to.emplace_back("a closed lease: look", [&, stranger] { cache.lease(stranger); });
  to.emplace_back("a closed lease: launch", [&, stranger] { launch_them(cache, {stranger}, {1}); });
  to.emplace_back("a closed lease: commit", [&, stranger] { commit_them(cache, {stranger}, {}); });
  to.emplace_back("a closed lease: want", [&, stranger] { cache.want(stranger, kFar); });
  to.emplace_back("a closed lease: fork", [&, stranger] { cache.fork(stranger); });
  to.emplace_back("a closed lease: close", [&, stranger] { cache.close(stranger, Keep::all, false); });
}

void add_transcripts(Mistakes& to, Cache& cache, TranscriptId closed, const Session* open) {
  static const std::vector<Token> three = {1, 2, 3};
  for (const TranscriptId stranger : {closed, TranscriptId{-1}, TranscriptId{kFar}}) {
    to.emplace_back("a closed transcript: extend", [&, stranger] { cache.extend(stranger, three, {}); });
    to.emplace_back("a closed transcript: truncate", [&, stranger] { cache.truncate(stranger, 0); });
    to.emplace_back("a closed transcript: look", [&, stranger] { cache.transcript(stranger); });
    to.emplace_back("a closed transcript: match", [&, stranger] { cache.match(cache.prompt(stranger)); });
    to.emplace_back("a closed transcript: reserve", [&, stranger] { cache.reserve(cache.prompt(stranger), {}); });
    to.emplace_back("a closed transcript: close", [&, stranger] { cache.close_transcript(stranger); });
  }
  if (open == nullptr) return;
  const auto id = open->id;
  const auto told = std::ssize(open->path.symbols);
  const auto extend = [&cache, id](std::vector<ContentKey> keys) { cache.extend(id, three, keys); };
  to.emplace_back("extend: content in what was told", [=] { extend({{told - 1, "x"}}); });
  to.emplace_back("extend: content beyond", [=] { extend({{told, "x"}, {told + 3, "x"}}); });
  to.emplace_back("extend: content twice", [=] { extend({{told + 1, "x"}, {told + 1, "y"}}); });
  to.emplace_back("truncate: longer", [&cache, id, told] { cache.truncate(id, told + 1); });
  to.emplace_back("truncate: to less than nothing", [&cache, id] { cache.truncate(id, -1); });
  to.emplace_back("reserve: a transcript and more than the arena",
                  [&cache, id] { cache.reserve(cache.prompt(id), {{}, kFar}); });
}

void add_sizes(Mistakes& to, Cache& cache, LeaseId id, std::vector<LeaseId> all) {
  to.emplace_back("launch: no token", [&, id] { launch_them(cache, {id}, {0}); });
  to.emplace_back("launch: fewer than none", [&, id] { launch_them(cache, {id}, {-1}); });
  to.emplace_back("launch: beyond all bounds", [&, id] { launch_them(cache, {id}, {kFar}); });
  to.emplace_back("launch: one lease twice", [&, id] { launch_them(cache, {id, id}, {1, 1}); });
  to.emplace_back("launch: all, and the last without a token", [&, all] {
    std::vector<Position> counts(all.size(), 1);
    counts.back() = 0;
    launch_them(cache, all, counts);
  });
  to.emplace_back("launch: fewer rows than none", [&, id] { launch_them(cache, {id}, {1}, {-2}); });
  to.emplace_back("launch: more rows than tokens", [&, id] { launch_them(cache, {id}, {1}, {2}); });
  to.emplace_back("launch: more rows than drafts", [&, id] { launch_them(cache, {id}, {20}, {20}); });
  to.emplace_back("want: before the prompt", [&, id] { cache.want(id, -1); });
  to.emplace_back("want: the empty prompt", [&, id] { cache.want(id, 0); });
}

void add_commits(Mistakes& to, Cache& cache, const Flight& flight, bool may_commit) {
  const auto id = flight.id;
  const Running oldest = flight.steps.empty() ? Running{} : flight.steps.front();
  const auto tokens = oldest.feed;
  const auto commit = [&cache, id, tokens](std::int64_t count, std::int64_t given) {
    auto some = tokens;
    some.resize(given, 1);
    commit_them(cache, {id}, some, counted(count));
  };
  const auto length = static_cast<std::int64_t>(tokens.size());
  if (!may_commit) {
    to.emplace_back("commit: out of order", [&, id, tokens] { commit_them(cache, {id}, tokens); });
    to.emplace_back("commit: of nothing, out of order", [=] { commit(0, 0); });
    return;
  }
  to.emplace_back("commit: one lease twice", [&, id, tokens] { commit_them(cache, {id, id}, tokens); });
  to.emplace_back("commit: a token too many", [=] { commit(length + 1, length + 1); });
  to.emplace_back("commit: a token that no count tells of", [=] { commit(length, length + 1); });
  to.emplace_back("commit: fewer than none", [=] { commit(-1, 0); });
  if (length > 0) to.emplace_back("commit: no tokens", [&, id] { commit_them(cache, {id}, {}); });
  if (oldest.rows > 0) {
    to.emplace_back("commit: no counts", [&, id, tokens] { commit_them(cache, {id}, tokens); });
    if (oldest.least() > 1) to.emplace_back("commit: no row", [=] { commit(oldest.least() - 1, oldest.least() - 1); });
    if (oldest.must_be) to.emplace_back("commit: of a void step", [=] { commit(length, length); });
  }
}
}  // namespace

void Walk::bad_call() {
  const int who = input_.byte(), which = input_.byte();
  Mistakes found;
  add_arguments(found, cache_);
  for (const LeaseId stranger : {closed_, LeaseId{-1}, LeaseId{kFar}}) add_strangers(found, cache_, stranger);
  add_transcripts(found, cache_, closed_session_, session(who));
  found.emplace_back("a plan before the first", [&] { cache_.applied(0); });
  found.emplace_back("a plan that was not made", [&] { cache_.applied(plans_ + 1); });
  found.emplace_back("release of no pin", [&] { cache_.release(kFar); });
  if (!may_plan()) found.emplace_back("plan: too many pending", [&] { cache_.collect(); });
  if (pending_.size() > 1) found.emplace_back("a plan before its turn", [&] { cache_.applied(pending_[1]); });
  if (!flights_.empty()) {
    const Flight& flight = flights_[static_cast<std::size_t>(who) % flights_.size()];
    const auto id = flight.id;
    std::vector<LeaseId> all;
    for (const auto& each : flights_) all.push_back(each.id);
    add_sizes(found, cache_, id, all);
    add_commits(found, cache_, flight, may_commit(flight));
    if (!may_launch(flight)) found.emplace_back("launch: too far ahead", [&, id] { launch_them(cache_, {id}, {1}); });
    if (!may_fork(flight)) found.emplace_back("fork: an open step", [&, id] { cache_.fork(id); });
  }
  const auto& [what, call] = found[static_cast<std::size_t>(which) % found.size()];
  refused(what, call);
}

}  // namespace fuzz
