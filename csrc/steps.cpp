// The steps of a lease: launch, plan, commit; those that verify drafts are in verify.cpp. The one rule of the
// design lives here: a lease reads what the last boundary left and writes only what it alone owns.
#include <algorithm>
#include <numeric>
#include <utility>

#include "cache.h"

namespace hybridcache {

namespace {
void check_one_each(const char* name, std::size_t given, std::size_t leases) {
  if (given != leases)
    throw std::invalid_argument(name + (": " + text(given)) + " given, expected one for each of " + text(leases) +
                                " leases");
}
}  // namespace

const std::vector<Lease*>& Cache::batch(std::span<const LeaseId> ids) {
  batch_leases_.clear();
  ++batch_;
  for (const LeaseId id : ids) {
    Lease& lease = open_lease(id);
    if (std::exchange(lease.batch, batch_) == batch_)
      throw std::invalid_argument("leases: number " + text(id) + " appears twice, expected each at most once");
    batch_leases_.push_back(&lease);
  }
  return batch_leases_;
}

// ---------------------------------------------------------------- launch

Position Cache::step_limit(const Lease& lease, Position count) const {
  const auto end = lease.computed + count;
  return lease.computed < lease.course.prompt_length ? std::min(end, lease.course.prompt_length) : end;
}

void Cache::check_launch(const Lease& lease, Position count, std::int64_t rows) const {
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
  check_rows(lease, count, rows);
  const auto end = step_limit(lease, count);
  if (!arena_.could_ever_satisfy(1, paging().spanned(end))) {
    throw std::invalid_argument("counts: " + text(count) + " tokens end at " + text(end) +
                                ", more than the empty arena can hold");
  }
}

std::span<const std::optional<Step>> Cache::launch(std::span<const LeaseId> ids, std::span<const Position> counts,
                                                   std::span<const std::int64_t> rows) {
  check_one_each("counts", counts.size(), ids.size());
  if (!rows.empty()) check_one_each("rows", rows.size(), ids.size());
  const auto& leases = batch(ids);
  auto& resolved = batch_numbers_;
  resolved.resize(ids.size());
  for (std::size_t i = 0; i < leases.size(); ++i) {
    resolved[i] = rows_of(*leases[i], counts[i], rows.empty() ? kDefaultRows : rows[i]);
    check_launch(*leases[i], counts[i], resolved[i]);
  }
  auto& steps = batch_steps_;
  steps.resize(ids.size());
  for (std::size_t i = 0; i < leases.size(); ++i) {
    Lease& lease = *leases[i];
    steps[i] = resolved[i] > 0 ? launch_verify(lease, counts[i], resolved[i]) : launch_one(lease, counts[i]);
    if (!steps[i]) counters_.refused_launches.add();
  }
  return steps;
}

std::optional<Step> Cache::launch_one(Lease& lease, Position count) {
  const Room room{admission_.has_room_for(Kind::fork), admission_.has_room_for(Kind::cut)};
  const auto cut = placement_.cut(lease.course, lease.last_boundary(), lease.computed, step_limit(lease, count), room);
  const auto pages = paging().spanned(cut.end);
  const auto missing = pages - static_cast<Position>(lease.pages.size());
  if (missing > 0 && !make_room_for_pages(lease, missing)) return std::nullopt;
  take_pages(lease, pages);
  placement_.taken(cut);
  OpenStep step;
  step.begin = step.begin_max = lease.computed;
  step.end = cut.end;
  step.kind = cut.kind;
  step.spare = cut.spare;
  step.read_slot = source(lease);
  step.write_slot = lease.live;
  acquire_inner(step, cut.inner);
  lease.fresh = false;
  lease.extra_passes += cut.extra_pass;
  counters_.extra_passes.add(cut.extra_pass);
  return open_step(lease, std::move(step));
}

const Step& Cache::open_step(Lease& lease, OpenStep&& step) {
  book(lease, step);
  lease.computed = step.end + (step.begin_max - step.begin);
  counters_.launches.add();
  digest_.mix(kLaunch, static_cast<std::uint64_t>(step.end) << 20 ^ lease.id);
  launched_.push_back(&lease);
  ++open_steps_;
  lease.steps.push_back(std::move(step));
  return lease.steps.back();
}

// A checkpoint is optional, a request is not: a lease that finds no room takes back the boundary that it has not gone
// on from yet, if nobody else reads it, and with it the slab of its next live slot.
bool Cache::make_room_for_pages(Lease& lease, Position pages) {
  if (admission_.make_room({0, pages}, Cause::launch)) return true;
  const bool could_take_back = !arena_.fixed() && lease.fresh && lease.read != nullptr &&
                               lease.due_tail.source == kNone && lease.read->checkpoint->pins == 1;
  if (!could_take_back || !admission_.feasible({-1, pages})) return false;
  Node* node = std::exchange(lease.read, nullptr);
  arena_.free_slot(std::exchange(lease.live, tree_.take_back(node, Cause::taken_back)));
  lease.fresh = false;
  counters_.dropped_checkpoints.add();
  return admission_.make_room({0, pages}, Cause::launch);
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
  for (const Lease* lease : launched_) {
    const OpenStep& step = lease->steps.back();
    const bool from_boundary = step.moves_state && step.read_slot != step.write_slot;
    if (from_boundary && step.read_slot == kNone) plan.zero_slots.push_back(step.write_slot);
    if (from_boundary && step.read_slot != kNone) plan.copy_slots.push_back({step.read_slot, step.write_slot});
    if (step.tail.source != kNone) plan.copy_pages.push_back(step.tail);
    plan.zero_pages.insert(plan.zero_pages.end(), step.zero_pages.begin(), step.zero_pages.end());
  }
  pending_.push_back(plan);  // what can fail is done
  ++next_plan_;
  for (Lease* lease : launched_) {
    for (const PageId page : lease->new_pages) arena_.clean(page);
    lease->new_pages.clear();
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
  pending_.erase(pending_.begin());
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

void Cache::commit(std::span<const LeaseId> ids, std::span<const Token> tokens,
                   std::optional<std::span<const std::int64_t>> counts) {
  if (counts) check_one_each("counts", counts->size(), ids.size());
  const auto& leases = batch(ids);
  auto& due = batch_numbers_;
  due.resize(ids.size());
  for (std::size_t i = 0; i < leases.size(); ++i) {
    const Lease& lease = *leases[i];
    check_commit(lease);
    if (!counts && lease.steps.front().verifies()) {
      throw std::invalid_argument("counts: none, expected one for each lease: the step of lease " + text(lease.id) +
                                  " does not say how many tokens stay");
    }
    due[i] = counts ? (*counts)[i] : lease.tokens_due();
    check_count(lease, due[i]);
  }
  const auto sum = std::accumulate(due.begin(), due.end(), std::int64_t{0});
  if (sum != static_cast<std::int64_t>(tokens.size())) {
    throw std::invalid_argument("tokens: " + text(tokens.size()) + " given, expected " + text(sum) +
                                ": those that the steps read beyond the prompts");
  }
  for (std::size_t i = 0; i < leases.size(); ++i) {
    commit_one(*leases[i], tokens.first(due[i]));
    tokens = tokens.subspan(due[i]);
  }
  end_rests();
}

void Cache::commit_one(Lease& lease, std::span<const Token> tokens) {
  OpenStep step = std::move(lease.steps.front());
  lease.steps.erase(lease.steps.begin());
  --open_steps_;
  const auto before = lease.committed;
  if (step.verifies()) {
    commit_verify(lease, std::move(step), tokens);
  } else {
    commit_ordinary(lease, step, tokens);
  }
  counters_.commits.add();
  counters_.tokens_committed.add(lease.committed - before);
  digest_.mix(kCommit, static_cast<std::uint64_t>(lease.committed) << 20 ^ lease.id);
}

void Cache::commit_ordinary(Lease& lease, const OpenStep& step, std::span<const Token> tokens) {
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
    if (step.gone_on) leave_behind(lease, step.write_slot);
  }
  return publication;
}

// The next step reads the slot of a boundary that turned out to be a duplicate. If it writes the live slot, this one is
// freed when it is done; a verify step leaves the live slot alone, so this one is the live one again.
void Cache::leave_behind(Lease& lease, SlotId slot) {
  if (!lease.steps.front().verifies()) {
    lease.left_behind = slot;
    return;
  }
  arena_.free_slot(std::exchange(lease.live, slot));
  lease.fresh = false;
}

void Cache::release_read(Lease& lease) {
  if (lease.read != nullptr) tree_.unpin_checkpoint(std::exchange(lease.read, nullptr));
}

bool Cache::known_checkpoint(const Lease& lease, Position position) const {
  const Node* node = tree_.find(lease.anchor, lease.span(lease.anchor->depth, position));
  return node != nullptr && node->checkpoint;
}

// Moves the anchor to `committed` (or where its last whole page became whole, unless a checkpoint stands there) and
// attaches what is to be published. Cannot fail: everything that it takes is in hand.
void Cache::publish(Lease& lease, const Publication& publication) {
  Node* node = lease.anchor;
  const LeasePages pages{lease.pages, lease.owned, lease.has_content};
  const auto extend_to = [&](Position to) { node = tree_.extend(node, lease.span(node->depth, to), pages); };
  std::vector<Node*> published;
  for (const auto& inner : publication.inner) {
    extend_to(inner.position);
    published.push_back(attach(lease, node, {inner.position, inner.slot, kNone, inner.kind}));
  }
  const auto whole = paging().whole(lease.committed);
  extend_to(publication.kind ? lease.committed : std::max(paging().whole_at(whole), node->depth));
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
    const auto number = paging().whole(each->depth);
    if (each->depth > number * paging().page_size)
      tree_.set_tail(each, number < whole ? tree_.path_page(node, number) : lease.pages[number]);
  }
}

// The checkpoint that this one goes beyond serves only branches from now on.
Node* Cache::attach(Lease& lease, Node* node, Checkpoint checkpoint) {
  if (keeps_history()) checkpoint.record = history_.at(lease.trail, lease.tokens, node->depth, checkpoint.kind);
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

}  // namespace hybridcache
