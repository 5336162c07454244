// Destroys caches in the middle of everything, under valgrind: after each call of a scene that leaves leases at every
// stage, content, pins, two pending plans and resting leases behind; before it, the last calls in every order, as far
// as they go. Whatever the order, nothing may be read after it was freed, and nothing may be left allocated.
#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>
#include <numeric>
#include <vector>

#include "cache.h"

namespace {
using namespace hybridcache;

Options options(bool fixed) {
  Options options;
  options.paging.page_size = 4;
  options.paging.lookahead = 1;
  options.page_bytes = 64;
  options.slot_bytes = 128;
  (fixed ? options.num_pages : options.num_slabs) = 48;
  options.num_slots = fixed ? 24 : 0;
  options.pass_cost = 0;
  options.interior_spacing = 8;
  options.run_ahead = 1;
  options.draft_tokens = 3;
  options.inner_checkpoints = true;
  return options;
}

// What its caller remembers of a cache.
struct Scene {
  explicit Scene(bool fixed) : cache(options(fixed)) {}

  static Prompt prompt(const std::string& salt) {
    static const std::vector<Token> tokens = [] {
      std::vector<Token> tokens(22);
      std::iota(tokens.begin(), tokens.end(), 1);
      return tokens;
    }();
    return {tokens, salt, {{3, "a picture"}, {17, std::string(100, 'x')}}};
  }
  void reserve(const std::string& salt, std::vector<Position> breakpoints) {
    leases.push_back(cache.reserve(prompt(salt), {std::move(breakpoints), 4}).value());
  }
  void launch(std::vector<std::size_t> which, Position count, std::int64_t rows = 0) {
    std::vector<LeaseId> ids;
    for (const auto index : which) ids.push_back(leases[index]);
    const std::vector<Position> counts(ids.size(), count);
    for (const auto& step : cache.launch(ids, counts, std::vector<std::int64_t>(ids.size(), rows))) step.value();
  }
  std::size_t last() const { return leases.size() - 1; }
  void plan() { pending.push_back(cache.collect().number); }
  void applied() {
    cache.applied(pending.front());
    pending.erase(pending.begin());
  }
  void commit(std::size_t index, std::vector<Token> tokens) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    cache.commit(std::span(&leases[index], 1), tokens, std::span(&count, 1));
  }
  void close(std::size_t index, Keep keep) {
    cache.close(leases[index], keep, false);
    leases.erase(leases.begin() + static_cast<std::ptrdiff_t>(index));
  }

  Cache cache;
  std::vector<LeaseId> leases;
  std::vector<PinId> pins;
  std::vector<std::int64_t> pending;
};

const std::vector<std::function<void(Scene&)>> kScene = {
    [](Scene& s) { s.reserve("", {5, 10}); },
    [](Scene& s) { s.launch({0}, 100); },  // to the prompt's end, with inner checkpoints
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.commit(0, {}); },
    [](Scene& s) { s.pins.push_back(s.cache.pin(Scene::prompt("")).value()); },
    [](Scene& s) { s.reserve("", {}); },  // resumes where a page is cut
    [](Scene& s) { s.reserve("tenant", {7}); },
    [](Scene& s) { s.leases.push_back(s.cache.fork(s.leases[0]).value()); },
    [](Scene& s) { s.launch({0, 2}, 3); },
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.launch({0, 1, 3}, 2); },  // the first runs ahead
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.launch({2}, 100); },
    [](Scene& s) { s.plan(); },                   // two are pending
    [](Scene& s) { s.close(0, Keep::nothing); },  // rests, with two open steps
    [](Scene& s) { s.commit(1, {}); },
    [](Scene& s) { s.cache.clear(std::nullopt); },
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.commit(0, {}); },
    [](Scene& s) { s.launch({0}, 1); },  // no plan collects it
    [](Scene& s) { s.close(0, Keep::all); },
    [](Scene& s) { s.pins.push_back(s.cache.pin(Scene::prompt("")).value()); },
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.reserve("drafts", {24, 26}); },
    [](Scene& s) { s.launch({s.last()}, 100); },
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.launch({s.last()}, 4, 4); },  // behind an ordinary step
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.commit(s.last(), {}); },
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.launch({s.last()}, 4, 4); },  // where it begins is not known
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.cache.want(s.leases.back(), 25); },
    [](Scene& s) { s.commit(s.last(), {1, 2}); },  // a row is published, the step behind keeps others
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.launch({s.last()}, 2, 2); },
    [](Scene& s) { s.commit(s.last(), {}); },  // void, and so is the step behind
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.applied(); },
    [](Scene& s) { s.commit(s.last(), {}); },
    [](Scene& s) { s.launch({s.last()}, 2, 1); },
    [](Scene& s) { s.plan(); },
    [](Scene& s) { s.close(s.last(), Keep::all); },  // rests, with a row
};

const std::array<std::function<void(Scene&)>, 4> kLastCalls = {
    [](Scene& s) {
      while (!s.leases.empty()) s.close(0, Keep::all);
    },
    [](Scene& s) {
      while (!s.pending.empty()) s.applied();
    },
    [](Scene& s) {
      for (const auto pin : s.pins) s.cache.release(pin);
    },
    [](Scene& s) { s.cache.clear(std::nullopt); },
};

void play(bool fixed, std::size_t calls, const std::array<int, 4>& order, std::size_t last_calls) {
  Scene scene(fixed);
  for (std::size_t i = 0; i < calls; ++i) kScene[i](scene);
  for (std::size_t i = 0; i < last_calls; ++i) kLastCalls[static_cast<std::size_t>(order[i])](scene);
  scene.cache.check();
}
}  // namespace

int main() {
  int caches = 0;
  for (const bool fixed : {false, true}) {
    for (std::size_t calls = 0; calls <= kScene.size(); ++calls) {
      std::array<int, 4> order = {0, 1, 2, 3};
      do {
        for (std::size_t last_calls = 0; last_calls <= order.size(); ++last_calls) {
          const bool seen = !std::is_sorted(order.begin() + last_calls, order.end());  // with those that are left out
          if (seen) continue;
          play(fixed, calls, order, last_calls);
          ++caches;
        }
      } while (std::next_permutation(order.begin(), order.end()));
    }
  }
  std::printf("%d caches destroyed in the middle of everything\n", caches);
}
