// Requests come in and branch here: reserve, fork, pins. What they match is in match.cpp, their steps in steps.cpp.
#include "cache.h"

#include <algorithm>

namespace hybridcache {

namespace {
// What a thousandth of the arena's bytes holds.
std::int64_t remembered_tokens(const Options& options, const Arena& arena) {
  return std::max<std::int64_t>(1 << 16, arena.size_in_pages() * options.page_bytes / 4096);
}

// As many as a full arena takes to tell, so that telling all anew costs no more than what was dropped.
std::int64_t event_capacity(const Options& options, const Arena& arena) {
  if (options.event_capacity > 0) return options.event_capacity;
  return std::max<std::int64_t>(1 << 20, arena.num_pages() * options.paging.page_size);
}
}  // namespace

Cache::Cache(const Options& options)
    : options_(options),
      arena_(options_, digest_),
      history_(options_, remembered_tokens(options_, arena_), contents_),
      tree_(options_, arena_, contents_, digest_),
      journal_(options_.paging, tree_, contents_, event_capacity(options_, arena_)),
      eviction_(options_, tree_, history_),
      admission_(arena_, eviction_),
      placement_(options_),
      transcripts_(options_.paging, tree_, contents_) {
  if (options_.events) tree_.watch_holdings(&journal_);
}

const Lease& Cache::lease(LeaseId id) const {
  const auto it = leases_.find(id);
  if (it == leases_.end() || it->second->resting)
    throw StateError("lease: number " + text(id) + " is closed, an open one was expected");
  return *it->second;
}

Lease& Cache::open_lease(LeaseId id) {
  return const_cast<Lease&>(lease(id));
}

// ---------------------------------------------------------------- reserve

void Cache::check_breakpoints(const std::vector<Position>& breakpoints, Position last) const {
  for (const Position position : breakpoints) {
    if (position < 1 || position > last)
      refuse("breakpoints: " + text(position) + ", expected positions in [1, " + text(last) + "]");
  }
}

std::optional<LeaseId> Cache::reserve(const Prompt& prompt, const ReserveOptions& options) {
  check_prompt(prompt);
  const auto length = static_cast<Position>(prompt.tokens.size());
  check_breakpoints(options.breakpoints, length + options.max_new_tokens);
  const auto pages = paging().spanned(length + options.max_new_tokens);
  if (!arena_.could_ever_satisfy(1, pages)) {
    refuse("tokens: a prompt of " + text(length) + " and max_new_tokens=" + text(options.max_new_tokens) +
           " need one slot and " + text(pages) + " pages, more than the empty arena can hold");
  }
  std::vector<Token> mapped;
  const auto walk = this->walk(prompt, symbols(prompt, mapped), length - 1);
  const auto match = to_match(walk, length);  // before anything leaves: walk.resume may
  const auto best = walk.resume == nullptr ? Kind{} : walk.resume->checkpoint->kind;
  const auto node = make_room_to_resume(prompt.salt, walk.resume, pages);
  if (!node) {
    counters_.refused_reserves.add();
    return std::nullopt;
  }
  auto lease = new_lease(pages, pages * paging().page_size - (*node)->depth);
  lease->match = match;
  lease->course.prompt_length = length;
  lease->course.branches = true;
  lease->course.resend = match.kv_length == length;
  if ((*node)->depth > 0) {
    const Kind kind = (*node)->checkpoint->kind;
    lease->course.branches = kind != Kind::turn_end && kind != Kind::prompt_end;
    placement_.used(kind);
    counters_.restored[index(kind)].add();
  }
  resume(*lease, *node, pages, prompt.transcript);
  keep_tokens(*lease, prompt);
  arrive(*lease, prompt.salt, options);
  if (lease->course.start < match.length) {
    const Missed given_up{.position = match.length, .cause = Cause::no_room, .kind = best};
    lease->match = {lease->course.start, match.kv_length, Reason::no_room, match.ways, given_up};
  }
  placement_.want(lease->course, lease->match, options.breakpoints);
  counters_.reserves.add();
  counters_.tokens_queried.add(length);
  counters_.tokens_hit.add(lease->match.length);
  counters_.lost[index(lease->match.reason)].add(length - lease->match.length);
  if (const auto& missed = lease->match.missed)
    counters_.missed[index(missed->cause)].add(missed->position - lease->match.length);
  const auto id = add_lease(std::move(lease)).id;
  digest_.mix(kReserve, id);
  return id;
}

// What has become of boundaries on its path, and what its match has missed of them: before this request counts as one.
void Cache::arrive(Lease& lease, const std::string& salt, const ReserveOptions& options) {
  if (!keeps_history()) {
    lease.match.missed = missed(lease.match, lease.course.prompt_length, {});
    return;
  }
  if (options.now >= 0) history_.tell(options.now);
  Record* start = lease.read == nullptr ? nullptr : lease.read->checkpoint->record;
  const auto reach = history_.reach(salt, start, lease.tokens);
  lease.match.missed = missed(lease.match, lease.course.prompt_length, reach);
  lease.trail = history_.arrived(salt, reach, options.priority);
  lease.course.left = lease.trail.left;
  const Record* exit = lease.trail.last;
  if (exit->node == nullptr && exit->uses > 1) lease.course.again = exit->depth;  // this is one of the uses
}

// Pins the node to resume from and makes room for a live slot and the pages beyond it. A request that is alone may give
// up its deepest checkpoint for a shallower one, since nobody else will ever make room.
std::optional<Node*> Cache::make_room_to_resume(const std::string& salt, Node* deepest, Position pages) {
  for (Node* node = deepest;;) {
    Node* at = node == nullptr ? tree_.make_root(salt) : node;
    tree_.hold(at);
    if (admission_.make_room({1, pages - paging().whole(at->depth)}, Cause::reserve)) return at;
    Node* shallower = Tree::checkpoint_above(at);
    tree_.let_go(at);
    if (node == nullptr || !leases_.empty()) return std::nullopt;
    node = shallower;
  }
}

// REQUIRES: node (a root, or a node with a checkpoint) is pinned, its checkpoint too, and there is room.
void Cache::resume(Lease& lease, Node* node, Position pages, const Transcript* transcript) {
  const auto start = node->depth;
  lease.course.start = lease.course.boundary = lease.committed = lease.computed = start;
  lease.anchor = node;
  lease.live = arena_.take_slot();
  auto& table = lease.pages.anew(pages);
  if (transcript == nullptr) {
    tree_.follow_pages(nullptr, node, table);
  } else {  // its anchor lies at or below the node: this one is pinned
    table.assign(transcript->table.begin(), transcript->table.begin() + paging().whole(start));
  }
  lease.owned.assign(lease.pages.size(), false);
  take_pages(lease, pages);
  if (start == 0) return;
  lease.read = node;
  if (node->checkpoint->tail != kNone) lease.due_tail = {node->checkpoint->tail, lease.pages[paging().whole(start)]};
  tree_.touch(node);
}

// Brings the page table to `pages` entries. REQUIRES: room.
void Cache::take_pages(Lease& lease, Position pages) {
  while (static_cast<Position>(lease.pages.size()) < pages) {
    lease.pages.push_back(arena_.take_page(lease.home));
    lease.owned.push_back(true);
    lease.new_pages.push_back(lease.pages.back());
  }
}

void Cache::keep_tokens(Lease& lease, const Prompt& prompt) {
  const auto start = lease.course.start;
  lease.tokens.reserve(lease.capacity(paging().page_size) - start);
  lease.tokens.assign(prompt.tokens.begin() + start, prompt.tokens.end());
  if (prompt.transcript != nullptr && prompt.transcript->has_content) {
    contents_.acquire(lease.tokens);
    lease.has_content = true;
  }
  for (const auto& key : prompt.content_keys) {
    if (key.position < start) continue;
    auto& token = lease.tokens[key.position - start];
    token = contents_.acquire(token, key.content);
    lease.has_content = true;
  }
}

// One that has closed, if its tables are not far too large for so many pages and tokens.
std::unique_ptr<Lease> Cache::new_lease(Position pages, Position tokens) {
  const auto fits = [&](const auto& spare) { return spare->fits(pages, tokens); };
  const auto spare = std::find_if(spare_leases_.rbegin(), spare_leases_.rend(), fits);
  if (spare == spare_leases_.rend()) return std::make_unique<Lease>();
  auto lease = std::move(*spare);
  spare_leases_.erase(std::next(spare).base());
  return lease;
}

Lease& Cache::add_lease(std::unique_ptr<Lease> lease) {
  lease->id = next_lease_++;
  counters_.open_leases.add();
  return *(leases_[lease->id] = std::move(lease));
}

// ---------------------------------------------------------------- fork

std::optional<LeaseId> Cache::fork(LeaseId id) {
  Lease& parent = open_lease(id);
  if (!parent.steps.empty())
    throw StateError("fork: lease " + text(id) + " has a step that is not committed, expected none");
  const auto at = parent.committed;
  Node* source = parent.fresh ? parent.anchor : tree_.find(parent.anchor, parent.span(parent.anchor->depth, at));
  const bool publishes = !parent.fresh && (source == nullptr || !source->checkpoint);
  const auto pages = static_cast<Position>(parent.pages.size());
  if (!publishes) tree_.hold(source);
  if (!admission_.make_room({1 + publishes, pages - paging().whole(at)}, Cause::fork)) {
    if (!publishes) tree_.let_go(source);
    return std::nullopt;
  }
  if (publishes) {
    publish(parent, {{}, Kind::fork, parent.live, false, arena_.take_slot()});
    source = parent.read;
    tree_.hold(source);
  }
  auto child = new_lease(pages, pages * paging().page_size - at);
  child->match = parent.match;
  child->course.prompt_length = parent.course.prompt_length;
  for (const auto& wanted : parent.course.wanted) {
    if (wanted.position > at) child->course.wanted.push_back(wanted);
  }
  resume(*child, source, pages);
  const auto rest = parent.span(at, parent.course.start + static_cast<Position>(parent.tokens.size()));
  child->tokens.assign(rest.begin(), rest.end());
  child->has_content = parent.has_content;
  if (keeps_history())
    child->trail = history_.follow(parent.trail, source->checkpoint ? source->checkpoint->record : nullptr);
  if (child->has_content) contents_.acquire(rest);
  counters_.forks.add();
  const auto child_id = add_lease(std::move(child)).id;
  digest_.mix(kFork, child_id);
  return child_id;
}

// ---------------------------------------------------------------- transcripts

Prompt Cache::prompt(TranscriptId id) const {
  Transcript& transcript = transcripts_.at(id);
  return {transcript.tokens, transcript.salt, {}, &transcript};
}

void Cache::extend(TranscriptId id, std::span<const Token> tokens, std::span<const ContentKey> keys) {
  Transcript& transcript = transcripts_.at(id);
  const auto before = static_cast<Position>(transcript.tokens.size());
  check_keys(keys, before, before + static_cast<Position>(tokens.size()));
  transcripts_.extend(transcript, tokens, keys);
}

void Cache::truncate(TranscriptId id, Position length) {
  Transcript& transcript = transcripts_.at(id);
  const auto now = static_cast<Position>(transcript.tokens.size());
  if (length < 0 || length > now) refuse("length: " + text(length) + ", expected 0 <= length <= " + text(now));
  transcripts_.truncate(transcript, length);
}

// ---------------------------------------------------------------- pins, clear

std::optional<PinId> Cache::pin(const Prompt& prompt) {
  check_prompt(prompt);
  std::vector<Token> mapped;
  const auto walk = this->walk(prompt, symbols(prompt, mapped), static_cast<Position>(prompt.tokens.size()));
  if (walk.resume == nullptr) return std::nullopt;
  tree_.hold(walk.resume);
  pins_[next_pin_] = walk.resume;
  counters_.pins.add();
  return next_pin_++;
}

Position Cache::pinned_length(PinId id) const {
  const auto it = pins_.find(id);
  if (it == pins_.end()) throw StateError("pin: number " + text(id) + " is released, a held one was expected");
  return it->second->depth;
}

void Cache::release(PinId id) {
  pinned_length(id);
  Node* node = pins_.at(id);
  pins_.erase(id);
  tree_.let_go(node);
  counters_.pins.add(-1);
  trim_to_cap();
}

std::int64_t Cache::clear(const std::optional<std::string>& salt) {
  const auto before = tree_.checkpoints();
  const auto recorded = journal_.size();
  for (Node* node : eviction_.all()) {
    const Node* root = node;
    while (root->parent != nullptr) root = root->parent;
    if (!salt || *root->salt == *salt) eviction_.evict(node, Cause::clear);
  }
  if (options_.events && !salt && arena_.tree_pages() == 0 && tree_.checkpoints() == 0) journal_.cleared(recorded);
  return before - tree_.checkpoints();
}

std::int64_t Cache::cached_bytes() const {
  return arena_.tree_pages() * options_.page_bytes + tree_.checkpoints() * options_.slot_bytes;
}

void Cache::trim_to_cap() {
  if (options_.max_cached_bytes < 0) return;
  while (cached_bytes() > options_.max_cached_bytes && eviction_.unpinned() > 0)
    eviction_.evict(eviction_.lowest(Eviction::kAny, false), Cause::cap);
}

std::vector<std::pair<std::string, std::int64_t>> Cache::stats() const {
  const auto& c = counters_;
  std::vector<std::pair<std::string, std::int64_t>> stats = {{"reserves", c.reserves.get()},
                                                             {"refused_reserves", c.refused_reserves.get()},
                                                             {"launches", c.launches.get()},
                                                             {"refused_launches", c.refused_launches.get()},
                                                             {"commits", c.commits.get()},
                                                             {"closes", c.closes.get()},
                                                             {"forks", c.forks.get()},
                                                             {"tokens_queried", c.tokens_queried.get()},
                                                             {"tokens_hit", c.tokens_hit.get()},
                                                             {"tokens_committed", c.tokens_committed.get()},
                                                             {"extra_passes", c.extra_passes.get()},
                                                             {"dropped_checkpoints", c.dropped_checkpoints.get()},
                                                             {"duplicate_checkpoints", c.duplicate_checkpoints.get()},
                                                             {"open_leases", c.open_leases.get()},
                                                             {"resting_leases", c.resting_leases.get()},
                                                             {"pins", c.pins.get()},
                                                             {"transcripts", transcripts_.count()},
                                                             {"nodes", tree_.nodes()},
                                                             {"checkpoints", tree_.checkpoints()},
                                                             {"pinned_checkpoints", tree_.pinned_checkpoints()},
                                                             {"tree_pages", arena_.tree_pages()},
                                                             {"taken_pages", arena_.taken_pages()},
                                                             {"taken_slots", arena_.taken_slots()},
                                                             {"slabs_with_pages", arena_.slabs_with_pages()},
                                                             {"cached_bytes", cached_bytes()}};
  for (int kind = 0; kind < kKinds; ++kind) {
    const std::string suffix = kKindNames[kind];
    stats.emplace_back("published_" + suffix, c.published[kind].get());
    stats.emplace_back("restored_" + suffix, c.restored[kind].get());
    stats.emplace_back("evicted_" + suffix, eviction_.evicted(static_cast<Kind>(kind)));
    stats.emplace_back("held_" + suffix, tree_.checkpoints(static_cast<Kind>(kind)));
  }
  for (int reason = 0; reason < kReasons; ++reason)
    stats.emplace_back(std::string("lost_") + kReasonNames[reason], c.lost[reason].get());
  for (int cause = 0; cause < kCauses; ++cause)
    stats.emplace_back(std::string("missed_") + kCauseNames[cause], c.missed[cause].get());
  return stats;
}

}  // namespace hybridcache
