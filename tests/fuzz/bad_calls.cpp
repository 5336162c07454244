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

void launch_them(Cache& cache, std::vector<LeaseId> ids, std::vector<Position> counts) {
  cache.launch(ids, counts);
}

void commit_them(Cache& cache, std::vector<LeaseId> ids, std::vector<Token> tokens) {
  cache.commit(ids, tokens);
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
  to.emplace_back("commit: more tokens than leases", [&] { commit_them(cache, {}, {1}); });
}

void add_strangers(Mistakes& to, Cache& cache, LeaseId stranger) {
  to.emplace_back("a closed lease: look", [&, stranger] { cache.lease(stranger); });
  to.emplace_back("a closed lease: launch", [&, stranger] { launch_them(cache, {stranger}, {1}); });
  to.emplace_back("a closed lease: commit", [&, stranger] { commit_them(cache, {stranger}, {}); });
  to.emplace_back("a closed lease: fork", [&, stranger] { cache.fork(stranger); });
  to.emplace_back("a closed lease: close", [&, stranger] { cache.close(stranger, Keep::all, false); });
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
}
void add_commits(Mistakes& to, Cache& cache, const Flight& flight, bool may_commit) {
  const auto id = flight.id;
  std::vector<Token> tokens;
  if (!flight.feeds.empty()) tokens = flight.feeds.front();
  if (!may_commit) {
    to.emplace_back("commit: out of order", [&, id, tokens] { commit_them(cache, {id}, tokens); });
    return;
  }
  to.emplace_back("commit: one lease twice", [&, id, tokens] { commit_them(cache, {id, id}, tokens); });
  if (!tokens.empty()) to.emplace_back("commit: no tokens", [&, id] { commit_them(cache, {id}, {}); });
  tokens.push_back(1);
  to.emplace_back("commit: a token too many", [&, id, tokens] { commit_them(cache, {id}, tokens); });
}
}  // namespace

void Walk::bad_call() {
  const int who = input_.byte(), which = input_.byte();
  Mistakes found;
  add_arguments(found, cache_);
  for (const LeaseId stranger : {closed_, LeaseId{-1}, LeaseId{kFar}}) add_strangers(found, cache_, stranger);
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
