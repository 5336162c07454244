// How a lease ends: what it leaves to the tree, how long what it holds rests, and what goes back to the arena.
#include <utility>

#include "cache.h"

namespace hybridcache {

void Cache::close(LeaseId id, Keep keep, bool discard, std::int64_t now, std::int64_t expected_return) {
  Lease& lease = open_lease(id);
  if (now >= 0) history_.tell(now);
  const auto length = lease.course.prompt_length;
  const bool kept = keep == Keep::all || (keep == Keep::prompt && lease.committed <= length);
  const bool publishes = lease.steps.empty() && !lease.fresh && kept && !discard;
  if (publishes && known_checkpoint(lease, lease.committed)) {
    counters_.duplicate_checkpoints.add();
  } else if (publishes) {
    const Kind at_prompt = lease.committed == length ? Kind::prompt_end : Kind::chunk_end;
    publish(lease, {{}, lease.committed > length ? Kind::turn_end : at_prompt, lease.live});
  }
  if (keeps_history() && keep == Keep::nothing) {
    history_.dismiss(lease.trail);
  } else if (keeps_history() && expected_return >= 0) {
    history_.expect(lease.trail, expected_return);
  }
  lease.retires = keep == Keep::nothing;
  counters_.closes.add();
  digest_.mix(kClose, static_cast<std::uint64_t>(id) << 3 ^ static_cast<std::uint64_t>(keep) << 1 ^ discard);
  counters_.open_leases.add(-1);
  open_steps_ -= static_cast<std::int64_t>(lease.steps.size());
  const auto plan = last_collected(lease);
  std::erase(launched_, &lease);  // what no plan has collected is never booked
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
  history_.leave(lease.trail);
  release_read(lease);
  for (const SlotId slot : {lease.live, lease.left_behind}) {
    if (slot != kNone) arena_.free_slot(slot);
  }
  for (const auto& step : lease.steps) {
    if (step.gone_on) arena_.free_slot(step.write_slot);
    for (const auto& inner : step.checkpoints) arena_.free_slot(inner.slot);
    for (const auto* rows : {&step.rows, &step.kept}) {
      for (const SlotId row : *rows) arena_.free_slot(row);
    }
  }
  for (std::size_t i = paging().whole(lease.course.start); i < lease.pages.size(); ++i) {  // the tree's come before
    if (lease.owned[i]) arena_.release_page(lease.pages[i]);
  }
  Node* last = Tree::ancestor_at(lease.anchor, lease.course.boundary);
  const bool its_own = last != nullptr && last->checkpoint && last->checkpoint->tick == lease.made;
  const bool retire = lease.retires && its_own && last->checkpoint->kind != Kind::breakpoint;
  tree_.unpin(lease.anchor);
  if (retire && last->children.empty()) tree_.supersede(last);
  if (lease.has_content) contents_.release(lease.tokens);
  auto closed = std::move(leases_.extract(lease.id).mapped());
  closed->clear();
  if (spare_leases_.size() == kSpareLeases) spare_leases_.erase(spare_leases_.begin());
  spare_leases_.push_back(std::move(closed));
}

}  // namespace hybridcache
