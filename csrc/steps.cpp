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
  std::set<LeaseId> seen;
  for (const LeaseId id : leases) {
    if (!seen.insert(id).second)
      throw std::invalid_argument("leases: number " + text(id) + " appears twice, expected each at most once");
  }
}
}  // namespace

// ---------------------------------------------------------------- launch

Position Cache::step_limit(const Lease& lease, Position count) const {
  const auto end = lease.computed + count;
  return lease.computed < lease.course.prompt_length ? std::min(end, lease.course.prompt_length) : end;
}

void Cache::check_launch(const Lease& lease, Position count) const {
  const auto open = static_cast<std::int64_t>(lease.steps.size());
  if (open > options_.run_ahead) {
    throw StateError("launch: lease " + text(lease.id) + " has " + text(open) +
                     " steps that are not committed, expected at most " + text(options_.run_ahead));
  }
  if (open > 0 && lease.steps.back().plan == next_plan_) {
    throw StateError("launch: no plan has collected the last step of lease " + text(lease.id) +
                     ", expected plan() first");
  }
  if (count < 1 || count > INT32_MAX)
    throw std::invalid_argument("counts: " + text(count) + " tokens, expected 1 <= count < 2**31");
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
  const Room room{admission_.has_room_for(Kind::fork), admission_.has_room_for(Kind::cut)};
  const auto cut = placement_.cut(lease.course, lease.last_boundary(), lease.computed, step_limit(lease, count), room);
  const auto pages = ceil_div(cut.end, options_.page_size);
  const auto missing = pages - static_cast<Position>(lease.pages.size());
  if (missing > 0 && !make_room_for_pages(lease, missing)) {
    counters_.refused_launches.add();
    return std::nullopt;
  }
  take_pages(lease, pages);
  placement_.taken(cut);
  OpenStep step;
  step.begin = lease.computed;
  step.end = cut.end;
  step.kind = cut.kind;
  step.spare = cut.spare;
  step.read_slot = source(lease);
  step.write_slot = lease.live;
  acquire_inner(step, cut.inner);
  book(lease, step);
  lease.computed = cut.end;
  lease.extra_passes += cut.extra_pass;
  counters_.extra_passes.add(cut.extra_pass);
  counters_.launches.add();
  digest_.mix(kLaunch, static_cast<std::uint64_t>(step.end) << 20 ^ lease.id);
  launched_.push_back(lease.id);
  ++open_steps_;
  lease.steps.push_back(std::move(step));
  return lease.steps.back();
}

// A checkpoint is optional, a request is not: a lease that finds no room takes back the boundary that it has not gone
// on from yet, if nobody else reads it, and with it the slab of its next live slot.
bool Cache::make_room_for_pages(Lease& lease, Position pages) {
  if (admission_.make_room({0, pages}, nullptr)) return true;
  const bool could_take_back = !arena_.fixed() && lease.fresh && lease.read != nullptr &&
                               lease.due_tail.source == kNone && lease.read->checkpoint->pins == 1;
  if (!could_take_back || !admission_.feasible({-1, pages}, nullptr)) return false;
  Node* node = std::exchange(lease.read, nullptr);
  arena_.free_slot(std::exchange(lease.live, tree_.take_back(node)));
  lease.fresh = false;
  counters_.dropped_checkpoints.add();
  return admission_.make_room({0, pages}, nullptr);
}

// The slot that the next step starts from. If the step before is still open and is to leave a boundary, the lease goes
// on from it here, on a new live slot; where there is no room for one, the boundary is dropped.
SlotId Cache::source(Lease& lease) {
  if (!lease.steps.empty() && lease.steps.back().kind) {
    OpenStep& last = lease.steps.back();
    if (const auto slot = optional_slot(*last.kind, last.spare)) {
      last.gone_on = lease.fresh = true;
      lease.live = *slot;
      return last.write_slot;
    }
    last.kind.reset();
  }
  if (!lease.fresh) return lease.live;
  return lease.read == nullptr ? kNone : lease.read->checkpoint->slot;
}

// A slot for a boundary; none where there is no room that it may take.
std::optional<SlotId> Cache::optional_slot(Kind kind, bool spare) {
  if (admission_.make_room_for(kind, spare)) return arena_.take_slot();
  counters_.dropped_checkpoints.add(!spare);
  return std::nullopt;
}

void Cache::acquire_inner(OpenStep& step, const std::vector<Wanted>& inner) {
  for (const auto& wanted : inner) {
    if (const auto slot = optional_slot(wanted.kind, wanted.spare)) {
      step.checkpoints.push_back({wanted.position, *slot, wanted.kind});
    }
  }
}

// What the next plan has to do for this step. After a boundary the state comes from its checkpoint; a page that was
// never written, or was a slot, must not be read as KV.
void Cache::book(Lease& lease, OpenStep& step) {
  step.plan = next_plan_;
  lease.fresh = false;
  step.tail = std::exchange(lease.due_tail, {kNone, kNone});
  for (const PageId page : lease.new_pages) {
    if (arena_.dirty(page) && page != step.tail.destination) step.zero_pages.push_back(page);
  }
}

// ---------------------------------------------------------------- plan

Plan Cache::collect() {
  if (static_cast<std::int64_t>(pending_.size()) > options_.run_ahead) {
    throw StateError("plan: number " + text(pending_.front().number) +
                     " is pending, expected that it was applied first");
  }
  Plan plan;
  plan.number = next_plan_;
  for (const LeaseId id : launched_) {
    const OpenStep& step = lease(id).steps.back();
    const bool from_boundary = step.read_slot != step.write_slot;
    if (from_boundary && step.read_slot == kNone) plan.zero_slots.push_back(step.write_slot);
    if (from_boundary && step.read_slot != kNone) plan.copy_slots.push_back({step.read_slot, step.write_slot});
    if (step.tail.source != kNone) plan.copy_pages.push_back(step.tail);
    plan.zero_pages.insert(plan.zero_pages.end(), step.zero_pages.begin(), step.zero_pages.end());
  }
  pending_.push_back(plan);  // what can fail is done
  ++next_plan_;
  for (const LeaseId id : launched_) {
    Lease& lease = open_lease(id);
    for (const PageId page : lease.new_pages) arena_.clean(page);
    lease.new_pages.clear();
  }
  launched_.clear();
  return plan;
}

void Cache::applied(std::int64_t plan) {
  if (plan < 1 || plan >= next_plan_)
    throw std::invalid_argument("plan: number " + text(plan) + ", expected one that plan() returned");
  if (plan <= applied_) return;  // applied again
  if (plan != pending_.front().number) {
    throw StateError("plan: number " + text(plan) + ", expected " + text(pending_.front().number) +
                     " first: plans are applied in order");
  }
  applied_ = plan;
  pending_.pop_front();
  digest_.mix(kApplied, plan);
  end_rests();
}

// ---------------------------------------------------------------- commit

void Cache::check_commit(const Lease& lease) const {
  if (lease.steps.empty()) throw StateError("commit: lease " + text(lease.id) + " has no launched step, expected one");
  const auto plan = lease.steps.front().plan;
  if (plan > applied_) {
    throw StateError("commit: the plan " + text(plan) + " of lease " + text(lease.id) +
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
  end_rests();
}

void Cache::commit_one(Lease& lease, std::span<const Token> tokens) {
  const OpenStep step = std::move(lease.steps.front());
  lease.steps.pop_front();
  --open_steps_;
  if (lease.left_behind != kNone) arena_.free_slot(std::exchange(lease.left_behind, kNone));
  lease.tokens.insert(lease.tokens.end(), tokens.begin(), tokens.end());
  lease.committed = step.end;
  release_read(lease);
  auto publication = to_publish(lease, step);
  if (publication.kind && !publication.gone_on) {
    if (const auto slot = optional_slot(*publication.kind, step.spare)) {
      publication.next = *slot;
    } else {
      publication.kind.reset();
    }
  }
  publish(lease, publication);
  counters_.commits.add();
  counters_.tokens_committed.add(step.end - step.begin);
  digest_.mix(kCommit, static_cast<std::uint64_t>(step.end) << 20 ^ lease.id);
}

// The boundaries of the step that the tree has no checkpoint at yet.
Cache::Publication Cache::to_publish(Lease& lease, const OpenStep& step) {
  Publication publication{{}, step.kind, step.write_slot, step.gone_on};
  for (const auto& inner : step.checkpoints) {
    if (known_checkpoint(lease, inner.position)) {
      arena_.free_slot(inner.slot);
      counters_.duplicate_checkpoints.add();
    } else {
      publication.inner.push_back(inner);
    }
  }
  if (step.kind && known_checkpoint(lease, step.end)) {
    publication.kind.reset();
    counters_.duplicate_checkpoints.add();
    if (step.gone_on) lease.left_behind = step.write_slot;  // the next step reads it
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

// Moves the anchor to `committed` (rounded down to whole pages unless a checkpoint stands there) and attaches what is
// to be published. Cannot fail: everything that it takes is in hand.
void Cache::publish(Lease& lease, const Publication& publication) {
  Node* node = lease.anchor;
  const auto page_size = options_.page_size;
  const LeasePages pages{lease.pages, lease.owned, lease.has_content};
  const auto extend_to = [&](Position to) { node = tree_.extend(node, lease.span(node->depth, to), pages); };
  std::vector<Node*> published;
  for (const auto& inner : publication.inner) {
    extend_to(inner.position);
    published.push_back(attach(lease, node, {inner.position, inner.slot, kNone, inner.kind}));
  }
  const auto full = lease.committed / page_size;  // pages
  extend_to(publication.kind ? lease.committed : std::max(full * page_size, node->depth));
  if (publication.kind) {
    published.push_back(attach(lease, node, {lease.committed, publication.state, kNone, *publication.kind}));
    if (!publication.gone_on) {
      lease.live = publication.next;
      lease.fresh = true;
    }
    release_read(lease);
    lease.read = node;
    tree_.pin_checkpoint(node);
  }
  tree_.pin(node);
  tree_.unpin(std::exchange(lease.anchor, node));
  for (Node* each : published) {
    const auto number = each->depth / page_size;
    if (each->depth % page_size != 0)
      tree_.set_tail(each, number < full ? tree_.path_page(node, number) : lease.pages[number]);
  }
}

// The checkpoint that this one goes beyond serves only branches from now on.
Node* Cache::attach(Lease& lease, Node* node, const Checkpoint& checkpoint) {
  tree_.attach(node, checkpoint);
  placement_.made(checkpoint.kind);
  counters_.published[index(checkpoint.kind)].add();
  Node* last = Tree::ancestor_at(node, lease.course.boundary);
  const bool serves_it = last != nullptr && last->checkpoint && last->checkpoint->kind != Kind::breakpoint;
  if (serves_it && last->children.size() == 1) tree_.supersede(last);
  lease.course.boundary = node->depth;
  lease.made = node->checkpoint->tick;
  return node;
}

// ---------------------------------------------------------------- close

void Cache::close(LeaseId id, Keep keep, bool discard) {
  Lease& lease = open_lease(id);
  const auto length = lease.course.prompt_length;
  const bool kept = keep == Keep::all || (keep == Keep::prompt && lease.committed <= length);
  const bool publishes = lease.steps.empty() && !lease.fresh && kept && !discard;
  if (publishes && known_checkpoint(lease, lease.committed)) {
    counters_.duplicate_checkpoints.add();
  } else if (publishes) {
    const Kind at_prompt = lease.committed == length ? Kind::prompt_end : Kind::chunk_end;
    publish(lease, {{}, lease.committed > length ? Kind::turn_end : at_prompt, lease.live});
  }
  lease.retires = keep == Keep::nothing;
  counters_.closes.add();
  digest_.mix(kClose, static_cast<std::uint64_t>(id) << 3 ^ static_cast<std::uint64_t>(keep) << 1 ^ discard);
  counters_.open_leases.add(-1);
  open_steps_ -= static_cast<std::int64_t>(lease.steps.size());
  const auto plan = last_collected(lease);
  std::erase(launched_, id);  // what no plan has collected is never booked
  if (plan != 0) {
    lease.resting = plan;
    counters_.resting_leases.add();
  } else {
    let_go(lease);
  }
  end_rests();
  trim_to_cap();
}

// The plan that carries the last open step that a plan has collected, 0 if there is none.
std::int64_t Cache::last_collected(const Lease& lease) const {
  for (auto step = lease.steps.rbegin(); step != lease.steps.rend(); ++step) {
    if (step->plan < next_plan_) return step->plan;
  }
  return 0;
}

// Counted in plans: an engine collects plan p + 1 + run_ahead only when it has the results of the steps of plan p.
bool Cache::may_still_run(std::int64_t plan) const {
  const bool in_flight = !pending_.empty() || open_steps_ > 0;
  return in_flight && applied_ < plan + options_.run_ahead;
}

void Cache::end_rests() {
  if (counters_.resting_leases.get() == 0) return;
  std::vector<Lease*> ended;
  for (const auto& [id, lease] : leases_) {
    if (lease->resting != 0 && !may_still_run(lease->resting)) ended.push_back(lease.get());
  }
  for (Lease* lease : ended) {
    counters_.resting_leases.add(-1);
    let_go(*lease);
  }
  if (!ended.empty()) trim_to_cap();
}

void Cache::let_go(Lease& lease) {
  release_read(lease);
  for (const SlotId slot : {lease.live, lease.left_behind}) {
    if (slot != kNone) arena_.free_slot(slot);
  }
  for (const auto& step : lease.steps) {
    if (step.gone_on) arena_.free_slot(step.write_slot);
    for (const auto& inner : step.checkpoints) arena_.free_slot(inner.slot);
  }
  for (std::size_t i = 0; i < lease.pages.size(); ++i) {
    if (lease.owned[i]) arena_.release_page(lease.pages[i]);
  }
  Node* last = Tree::ancestor_at(lease.anchor, lease.course.boundary);
  const bool its_own = last != nullptr && last->checkpoint && last->checkpoint->tick == lease.made;
  const bool retire = lease.retires && its_own && last->checkpoint->kind != Kind::breakpoint;
  tree_.unpin(lease.anchor);
  if (retire && last->children.empty()) tree_.supersede(last);
  if (lease.has_content) contents_.release(lease.tokens);
  leases_.erase(lease.id);
}

}  // namespace hybridcache
