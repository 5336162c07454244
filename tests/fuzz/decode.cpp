// From bytes to operands: options, prompts, shapes of steps, and what may be asked of which lease; decode.py has the
// words. What may be asked is derived from the lease here, not from what the core refuses. Changes no cache.
#include <algorithm>

#include "walk.h"

namespace fuzz {

namespace {
constexpr const char* kSalts[] = {"", "tenant"};
constexpr const char* kContents[] = {"", "cat", "dog"};

std::int64_t of(std::initializer_list<std::int64_t> values, int choice) {
  return values.begin()[choice];
}
}  // namespace

Setup read_setup(Reader& input) {
  Setup setup;
  Options& options = setup.options;
  const std::int64_t page_size = options.paging.page_size = of({1, 2, 3, 4, 7, 16}, input.byte() % 6);
  const int shape = input.byte(), first = input.byte(), second = input.byte();
  const bool fixed = shape & 1, large = shape & 2;
  const std::int64_t per_slab = 1 + (shape >> 2) % 5, slack = (shape >> 5) % 3;
  options.small_part = 8;  // as in all tests
  options.page_bytes = 16 * page_size;
  options.slot_bytes = per_slab * options.page_bytes - 16 * std::min(slack, page_size - 1);
  if (fixed) {
    options.num_pages = large ? 40 + first % 60 : 8 + first % 20;
    options.num_slots = large ? 8 + second % 10 : 3 + second % 6;
  } else {
    options.num_slabs = large ? 12 + first % 36 : 4 + first % 8;
  }
  const int flags = input.byte(), costs = input.byte(), cap = input.byte();
  options.run_ahead = flags & 1;
  options.inner_checkpoints = flags & 2;
  options.alignment = flags & 4 ? 4 : 1;
  options.policy = flags & 8 ? Policy::lru : Policy::supersede;
  setup.vocabulary = flags & 16 ? 3 : 2;
  options.pass_cost = costs % 9;
  options.interior_spacing = 2 + costs / 9 % 7;
  if (flags & 32) options.max_cached_bytes = cap % 6 * per_slab * options.page_bytes + cap / 6 % 8 * options.page_bytes;
  const int drafts = input.byte();
  options.draft_tokens = drafts & 7;
  options.paging.lookahead = drafts >> 3 & 1;
  (fixed ? options.num_slots : options.num_slabs) += 2 * options.draft_tokens * ((drafts >> 4 & 3) % 3);
  setup.finish = input.byte();
  return setup;
}

Ask::Ask(const Path& path) {
  for (const auto& symbol : path.symbols) tokens_.push_back(symbol.token);
  prompt_ = {tokens_, path.salt, {}};
  for (std::size_t i = 0; i < path.symbols.size(); ++i) {
    const int content = path.symbols[i].content;
    if (content != 0) prompt_.content_keys.push_back({static_cast<Position>(i), kContents[content]});
  }
}

// ---------------------------------------------------------------- prompts

Token Walk::token(std::int64_t index, int seed) const {
  return static_cast<Token>((seed * (index + 1) >> 3) % setup_.vocabulary);
}

std::vector<Symbol> Walk::fresh(std::int64_t length, int seed) const {
  std::vector<Symbol> symbols;
  for (std::int64_t i = 0; i < length; ++i) symbols.push_back({token(i, seed)});
  if (seed % 8 == 7 && length > 0) symbols[(seed >> 3) % length] = {0, static_cast<std::uint8_t>(1 + (seed >> 7))};
  return symbols;
}

Position Walk::room() const {
  const Arena& arena = cache_.arena();
  return (arena.num_pages() - (arena.fixed() ? 0 : arena.pages_per_slab())) * setup_.options.paging.page_size;
}

Position Walk::longest_prompt() const {
  return std::max<Position>(2, std::min({Position{48}, 5 * setup_.options.paging.page_size + 6, room() / 3}));
}

Path Walk::path() {
  const int how = input_.byte(), which = input_.byte(), size = input_.byte(), seed = input_.byte();
  const auto recent = std::min(paths_.size(), kRemembered);
  if (how % 8 == 0 || recent == 0) return {kSalts[how >> 6 & 1], fresh(1 + size % longest_prompt(), seed)};
  Path path = paths_[paths_.size() - recent + which % recent];
  auto& symbols = path.symbols;
  const auto length = static_cast<Position>(symbols.size());
  const auto extend = [&](Position by) {
    const auto more = fresh(by, seed);
    symbols.insert(symbols.end(), more.begin(), more.end());
  };
  switch (how % 8) {
    case 1:
    case 2:
      extend(1 + size % 6);
      break;
    case 3:
      symbols.resize(1 + size % length);
      break;
    case 4:
      symbols.resize(size % length);
      extend(1 + (size >> 5));
      break;
    case 6:
      path.salt = kSalts[path.salt.empty()];
      break;
    case 7:
      extend(std::max<Position>(0, std::min<Position>(room(), 100) - length - size % 4));
      return path;
  }
  if (static_cast<Position>(symbols.size()) > 2 * longest_prompt()) symbols.resize(2 * longest_prompt());
  return path;
}

// ---------------------------------------------------------------- shapes of steps

Position Walk::count(const Flight& flight, int byte) const {
  const Lease& lease = cache_.lease(flight.id);
  const auto left = lease.course.prompt_length - lease.computed;
  if (left > 0) return byte & 1 ? left + (byte >> 1) % 3 : 1 + (byte >> 1) % left;
  if (setup_.options.draft_tokens > 0) return 1 + byte % (setup_.options.draft_tokens + 2);
  return byte % 4 == 0 ? 1 + (byte >> 2) % 4 : 1;
}

std::int64_t Walk::rows(const Flight& flight, Position count, int how) const {
  const Lease& lease = cache_.lease(flight.id);
  if (setup_.options.draft_tokens == 0 || lease.computed < lease.course.prompt_length)
    return how == 31 ? 1 : Cache::kDefaultRows;
  return of({Cache::kDefaultRows, count, 1, (how >> 2) % (count + 2)}, how % 4);
}

Position Walk::position(const Flight& flight, int where) const {
  const Lease& lease = cache_.lease(flight.id);
  const Position by = where >> 2;
  switch (where % 4) {
    case 0:
      return lease.committed + by % (lease.computed - lease.committed + 8);
    case 1:
      return lease.computed;
    case 2:
      return lease.computed + 1 + by % 3;
  }
  if (lease.steps.empty()) return lease.computed + 1 + by;
  const Step& oldest = lease.steps.front();
  return oldest.end - by % (oldest.end - oldest.begin);
}

// ---------------------------------------------------------------- what may be asked

bool Walk::fits(Position tokens) const {
  const Arena& arena = cache_.arena();
  const auto pages = ceil_div(tokens, setup_.options.paging.page_size);
  return pages <= arena.num_pages() - (arena.fixed() ? 0 : arena.pages_per_slab());
}

// Of a lease that may launch: rows that no step can have, or more tokens than the arena could ever hold.
bool Walk::is_mistake(const Flight& flight, const Shape& shape) const {
  const Lease& lease = cache_.lease(flight.id);
  const auto most = setup_.options.draft_tokens + 1;
  const bool decodes = lease.computed >= lease.course.prompt_length;
  const auto before = flight.steps.empty() ? 0 : flight.steps.back().rows;
  const bool drafts = (decodes && shape.count >= 2 && shape.count <= most) || before > 0;
  const auto rows = shape.rows != Cache::kDefaultRows ? shape.rows : drafts ? shape.count : 0;
  if (rows > std::min(shape.count, most)) return true;
  if (rows > 0 && (most == 1 || !decodes)) return true;
  if ((before > 0 && rows == 0) || (before > 1 && rows != shape.count)) return true;
  const auto end = lease.computed + shape.count;
  return !fits(decodes ? end : std::min(end, lease.course.prompt_length));
}

bool Walk::may_launch(const Flight& flight) const {
  const auto& steps = cache_.lease(flight.id).steps;
  const auto open = static_cast<std::int64_t>(steps.size());
  return open <= setup_.options.run_ahead &&
         (open == 0 || (steps.back().plan <= plans_ && !flight.steps.back().must_be));
}

// Nor does an engine go on behind a step of which it knows that nothing stays.
bool Walk::would_launch(const Flight& flight) const {
  return may_launch(flight) && (flight.steps.empty() || !flight.steps.back().is_void);
}

bool Walk::may_want(const Flight& flight, Position position) const {
  const Lease& lease = cache_.lease(flight.id);
  if (position > lease.computed) return true;
  if (flight.steps.empty()) return false;
  if (position == lease.computed && flight.steps.back().rows == 0) return true;
  const OpenStep& oldest = lease.steps.front();
  return position > oldest.end - flight.steps.front().rows && position <= oldest.end && !flight.steps.front().must_be;
}

bool Walk::may_plan() const {
  return static_cast<std::int64_t>(pending_.size()) <= setup_.options.run_ahead;
}

bool Walk::may_commit(const Flight& flight) const {
  const auto& steps = cache_.lease(flight.id).steps;
  return !steps.empty() && steps.front().plan <= applied_;
}

// Those that an engine which runs ahead commits now: the step behind is launched, or need not be.
bool Walk::has_ended(const Flight& flight) const {
  const auto open = static_cast<std::int64_t>(flight.steps.size());
  return may_commit(flight) && (open > setup_.options.run_ahead || flight.steps.front().is_void);
}

bool Walk::may_fork(const Flight& flight) const {
  return cache_.lease(flight.id).steps.empty();
}

std::vector<std::size_t> Walk::those(bool (Walk::*may)(const Flight&) const) const {
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < flights_.size(); ++i) {
    if ((this->*may)(flights_[i])) found.push_back(i);
  }
  return found;
}

}  // namespace fuzz
