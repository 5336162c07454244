// The steps of a lease: launch, plan, commit, close. The one rule of the design lives here: a lease reads what the last
// boundary left and writes only what it alone owns.
#include <algorithm>
#include <set>
#include <utility>

#include "cache.h"

namespace hybridcache {

namespace {
std::string text(std::int64_t value) {
  return std::to_string(value);
}

void check_distinct(std::span<const LeaseId> leases) {
  if (std::set<LeaseId>(leases.begin(), leases.end()).size() != leases.size()) {
    throw std::invalid_argument("leases: one appears twice, expected each at most once");
  }
}
}  // namespace

// ---------------------------------------------------------------- launch

Position Cache::step_limit(const Lease& lease, Position count) const {
  const auto end = lease.computed + count;
  return lease.computed < lease.course.prompt_length ? std::min(end, lease.course.prompt_length) : end;
}

void Cache::check_launch(const Lease& lease, Position count) const {
  if (lease.step)
    throw StateError("launch: lease " + text(lease.id) + " has a step that is not committed, expected none");
  if (count < 1 || count > INT32_MAX)
    throw std::invalid_argument("counts: " + text(count) + " tokens, expected at least 1");
  const auto end = step_limit(lease, count);
  if (!arena_.could_ever_satisfy(1, ceil_div(end, options_.page_size))) {
    throw std::invalid_argument("counts: " + text(count) + " tokens end at " + text(end) +
                                ", more than the empty arena can hold");
  }
}

std::vector<std::optional<Step>> Cache::launch(std::span<const LeaseId> leases, std::span<const Position> counts) {
  if (leases.size() != counts.size()) {
    throw std::invalid_argument("counts: " + text(counts.size()) + " given, expected one for each of " +
                                text(leases.size()) + " leases");
  }
  check_distinct(leases);
  for (std::size_t i = 0; i < leases.size(); ++i) check_launch(lease(leases[i]), counts[i]);
  std::vector<std::optional<Step>> steps;
  for (std::size_t i = 0; i < leases.size(); ++i) steps.push_back(launch_one(open_lease(leases[i]), counts[i]));
  return steps;
}

std::optional<Step> Cache::launch_one(Lease& lease, Position count) {
  const auto cut = placement_.cut(lease.course, lease.computed, step_limit(lease, count));
  const auto pages = ceil_div(cut.end, options_.page_size);
  const auto missing = pages - static_cast<Position>(lease.pages.size());
  if (missing > 0 && !admission_.make_room({0, missing}, nullptr)) {
    counters_.refused_launches.add();
    return std::nullopt;
  }
  take_pages(lease, pages);
  placement_.taken(cut);
  OpenStep step;
  step.begin = lease.computed;
  step.end = cut.end;
  step.kind = cut.kind;
  acquire_inner(step, cut.inner);
  book(lease, step);
  lease.computed = cut.end;
  lease.extra_passes += cut.extra_pass;
  counters_.extra_passes.add(cut.extra_pass);
  counters_.launches.add();
  digest_.mix(kLaunch, static_cast<std::uint64_t>(step.end) << 20 ^ lease.id);
  launched_.push_back(lease.id);
  lease.step = std::move(step);
  return *lease.step;
}

void Cache::acquire_inner(OpenStep& step, const std::vector<Wanted>& inner) {
  for (const auto& wanted : inner) {
    if (admission_.make_room_for(wanted.kind, {1, 0})) {
      step.checkpoints.push_back({wanted.position, arena_.take_slot(), wanted.kind});
    } else {
      counters_.dropped_checkpoints.add();
    }
  }
}

// What the next plan has to do for this step. After a boundary the state comes from its checkpoint; a page that was
// never written, or was a slot, must not be read as KV.
void Cache::book(Lease& lease, OpenStep& step) {
  step.plan = next_plan_;
  step.write_slot = lease.live;
  step.from_boundary = lease.fresh;
  step.read_slot = lease.live;
  if (lease.fresh) step.read_slot = lease.read == nullptr ? kNone : lease.read->checkpoint->slot;
  step.tail = std::exchange(lease.due_tail, {kNone, kNone});
  for (const PageId page : lease.new_pages) {
    if (arena_.dirty(page) && page != step.tail.destination) step.zero_pages.push_back(page);
  }
  lease.fresh = false;
}

// ---------------------------------------------------------------- plan

Plan Cache::collect() {
  if (pending_.number != 0)
    throw StateError("plan: number " + text(pending_.number) + " is pending, expected that it was applied first");
  Plan plan;
  plan.number = next_plan_++;
  for (const LeaseId id : launched_) {
    Lease& lease = open_lease(id);
    const OpenStep& step = *lease.step;
    if (step.from_boundary && step.read_slot == kNone) plan.zero_slots.push_back(step.write_slot);
    if (step.from_boundary && step.read_slot != kNone) plan.copy_slots.push_back({step.read_slot, step.write_slot});
    if (step.tail.source != kNone) plan.copy_pages.push_back(step.tail);
    plan.zero_pages.insert(plan.zero_pages.end(), step.zero_pages.begin(), step.zero_pages.end());
    for (const PageId page : lease.new_pages) arena_.clean(page);
    lease.new_pages.clear();
  }
  launched_.clear();
  pending_ = plan;
  return plan;
}

void Cache::applied(std::int64_t plan) {
  if (plan < 1 || plan >= next_plan_)
    throw std::invalid_argument("plan: number " + text(plan) + ", expected one that plan() returned");
  if (plan != pending_.number) return;  // an older one, applied again
  pending_ = {};
  std::vector<Lease*> rested;
  for (const auto& [id, lease] : leases_) {
    if (lease->resting) rested.push_back(lease.get());
  }
  for (Lease* lease : rested) let_go(*lease);
  if (!rested.empty()) trim_to_cap();
}

// ---------------------------------------------------------------- commit

void Cache::check_commit(const Lease& lease) const {
  if (!lease.step) throw StateError("commit: lease " + text(lease.id) + " has no launched step, expected one");
  if (lease.step->plan >= next_plan_ || lease.step->plan == pending_.number) {
    throw StateError("commit: the plan " + text(lease.step->plan) + " of lease " + text(lease.id) +
                     " is not applied, expected applied(plan) first");
  }
}

void Cache::commit(std::span<const LeaseId> leases, std::span<const Token> tokens) {
  check_distinct(leases);
  std::int64_t due = 0;
  for (const LeaseId id : leases) {
    check_commit(lease(id));
    due += lease(id).tokens_due();
  }
  if (due != static_cast<std::int64_t>(tokens.size())) {
    throw std::invalid_argument("tokens: " + text(tokens.size()) + " given, expected " + text(due) +
                                ": those that the steps read beyond the prompts");
  }
  for (const LeaseId id : leases) {
    Lease& lease = open_lease(id);
    const auto own = tokens.first(lease.tokens_due());
    tokens = tokens.subspan(own.size());
    commit_one(lease, own);
  }
}

void Cache::commit_one(Lease& lease, std::span<const Token> tokens) {
  const OpenStep step = std::move(*lease.step);
  lease.step.reset();
  lease.tokens.insert(lease.tokens.end(), tokens.begin(), tokens.end());
  lease.committed = step.end;
  release_read(lease);
  auto publication = to_publish(lease, step);
  acquire_page_for_inner(lease, publication);
  acquire_for_boundary(lease, publication);
  publish(lease, std::move(publication));
  counters_.commits.add();
  counters_.tokens_committed.add(step.end - step.begin);
  digest_.mix(kCommit, static_cast<std::uint64_t>(step.end) << 20 ^ lease.id);
}

// The boundaries of the step that the tree has no checkpoint at yet.
Cache::Publication Cache::to_publish(const Lease& lease, const OpenStep& step) {
  Publication publication;
  for (const auto& inner : step.checkpoints) {
    if (known_checkpoint(lease, inner.position)) {
      arena_.free_slot(inner.slot);
      counters_.duplicate_checkpoints.add();
    } else {
      publication.inner.push_back(inner);
    }
  }
  publication.kind = placement_.boundary_at(lease.course, step.kind, step.begin, step.end);
  if (publication.kind && known_checkpoint(lease, step.end)) {
    publication.kind.reset();
    counters_.duplicate_checkpoints.add();
  }
  return publication;
}

void Cache::release_read(Lease& lease) {
  if (lease.read != nullptr) tree_.unpin_checkpoint(std::exchange(lease.read, nullptr));
}

bool Cache::known_checkpoint(const Lease& lease, Position position) const {
  const Node* node = tree_.find(lease.anchor, lease.span(lease.anchor->depth, position));
  return node != nullptr && node->checkpoint;
}

// Inner checkpoints in the page that `committed` cuts take that page as their tail, and the lease needs a copy of it to
// go on.
void Cache::acquire_page_for_inner(Lease& lease, Publication& publication) {
  auto& inner = publication.inner;
  const auto edge = lease.committed / options_.page_size * options_.page_size;
  const auto first = std::find_if(inner.begin(), inner.end(), [&](const auto& each) { return each.position > edge; });
  if (first == inner.end()) return;
  if (admission_.make_room_for(first->kind, {0, 1})) {
    publication.page = arena_.take_page(lease.home);
    return;
  }
  for (auto each = first; each != inner.end(); ++each) arena_.free_slot(each->slot);
  counters_.dropped_checkpoints.add(inner.end() - first);
  inner.erase(first, inner.end());
}

void Cache::acquire_for_boundary(Lease& lease, Publication& publication) {
  if (!publication.kind) return;
  const bool needs_page = lease.committed % options_.page_size != 0 && publication.page == kNone;
  if (!admission_.make_room_for(*publication.kind, {1, needs_page})) {
    counters_.dropped_checkpoints.add();
    publication.kind.reset();
    return;
  }
  publication.slot = arena_.take_slot();
  if (needs_page) publication.page = arena_.take_page(lease.home);
}

// Moves the anchor to `committed` (rounded down to whole pages unless a checkpoint stands there) and attaches what is
// to be published. Cannot fail: everything that it takes is in hand.
void Cache::publish(Lease& lease, Publication publication) {
  Node* node = lease.anchor;
  const auto page_size = options_.page_size;
  const auto extend_to = [&](Position to) {
    node = tree_.extend(node, lease.span(node->depth, to), lease.pages, lease.owned);
  };
  std::vector<Node*> published;
  for (const auto& inner : publication.inner) {
    extend_to(inner.position);
    published.push_back(attach(lease, node, inner.slot, inner.kind));
  }
  const auto edge = lease.committed / page_size * page_size;
  extend_to(publication.kind ? lease.committed : std::max(edge, node->depth));
  if (publication.kind) {
    published.push_back(attach(lease, node, lease.live, *publication.kind));
    lease.live = publication.slot;
    lease.fresh = true;
  }
  tree_.pin(node);
  tree_.unpin(std::exchange(lease.anchor, node));
  for (Node* each : published) {
    if (each->depth % page_size == 0) continue;
    const auto number = each->depth / page_size;
    tree_.set_tail(each, number < edge / page_size ? tree_.path_page(node, number) : cut_page(lease, publication.page));
  }
  if (publication.kind || lease.due_tail.source != kNone) {
    release_read(lease);
    lease.read = published.back();
    tree_.pin_checkpoint(lease.read);
  }
}

// The page that `committed` cuts, as a tail: it becomes the tree's, and the lease goes on in a copy. Where that copy is
// already due, its source.
PageId Cache::cut_page(Lease& lease, PageId replacement) {
  if (lease.due_tail.source != kNone) return lease.due_tail.source;
  const auto number = lease.committed / options_.page_size;
  const PageId page = lease.pages[number];
  ensure(lease.owned[number], "the page that a boundary cuts is not its lease's");
  lease.owned[number] = false;
  if (replacement == kNone) return page;  // the lease closes
  lease.pages[number] = replacement;
  lease.owned[number] = true;
  lease.new_pages.push_back(replacement);
  lease.due_tail = {page, replacement};
  return page;
}

// The checkpoint that this one goes beyond serves only branches from now on.
Node* Cache::attach(Lease& lease, Node* node, SlotId slot, Kind kind) {
  tree_.attach(node, node->depth, {slot, kNone, kind});
  placement_.made(kind);
  counters_.published[index(kind)].add();
  Node* last = Tree::ancestor_at(node, lease.course.boundary);
  if (last != nullptr && last->checkpoint && last->checkpoint->kind != Kind::breakpoint && last->children.size() == 1)
    tree_.supersede(last);
  lease.course.boundary = node->depth;
  return node;
}

// ---------------------------------------------------------------- close

void Cache::close(LeaseId id, Keep keep, bool discard) {
  Lease& lease = open_lease(id);
  const bool kept = keep == Keep::all || (keep == Keep::prompt && lease.committed <= lease.course.prompt_length);
  const bool publishes = !lease.step && !lease.fresh && kept && !discard;
  if (publishes && known_checkpoint(lease, lease.committed)) {
    counters_.duplicate_checkpoints.add();
  } else if (publishes) {
    const auto length = lease.course.prompt_length;
    const Kind kind = lease.committed > length    ? Kind::turn_end
                      : lease.committed == length ? Kind::prompt_end
                                                  : Kind::chunk_end;
    publish(lease, {{}, kind});
  }
  Node* last = Tree::ancestor_at(lease.anchor, lease.course.boundary);
  const bool retire =
      keep == Keep::nothing && last != nullptr && last->checkpoint && last->checkpoint->kind != Kind::breakpoint;
  counters_.closes.add();
  digest_.mix(kClose, id);
  if (lease.step && lease.step->plan == pending_.number) {
    lease.resting = true;
    counters_.open_leases.add(-1);
    counters_.resting_leases.add();
  } else {
    let_go(lease);
  }
  if (retire && last->children.empty()) tree_.supersede(last);
  trim_to_cap();
}

void Cache::let_go(Lease& lease) {
  (lease.resting ? counters_.resting_leases : counters_.open_leases).add(-1);
  release_read(lease);
  if (lease.live != kNone) arena_.free_slot(lease.live);
  if (lease.step) {
    for (const auto& inner : lease.step->checkpoints) arena_.free_slot(inner.slot);
    std::erase(launched_, lease.id);
  }
  for (std::size_t i = 0; i < lease.pages.size(); ++i) {
    if (lease.owned[i]) arena_.free_page(lease.pages[i]);
  }
  tree_.unpin(lease.anchor);
  if (lease.has_content) contents_.release(lease.tokens);
  leases_.erase(lease.id);
}

}  // namespace hybridcache
