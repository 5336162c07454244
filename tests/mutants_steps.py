"""The mutants of a request's steps: csrc/steps.cpp, verify.cpp and close.cpp. Data only, in the form of
mutants_list.py.
"""

from __future__ import annotations

STEPS = r"""
left_behind_before_drafts: I1 drafts
- if (!lease.steps.front().verifies()) {
+ if (true) {
counts_ignored: drafts
- due[i] = counts ? (*counts)[i] : lease.tokens_due();
+ due[i] = lease.tokens_due();
drafts_without_counts: I4 drafts
- if (!counts && lease.steps.front().verifies()) {
+ if (false) {
computed_of_the_lowest_begin: I4 drafts
- lease.computed = step.end + (step.begin_max - step.begin);
+ lease.computed = step.end;
three_steps_ahead: order-of-calls
- if (open > options_.run_ahead) {
+ if (open > options_.run_ahead + 1) {
two_steps_in_a_plan: order-of-calls
- if (open > 0 && lease.steps.back().plan == next_plan_) {
+ if (false) {
step_beyond_the_prompt: state-too-far
- ? std::min(end, lease.course.prompt_length) : end;
+ ? end : end;
batch_checked_in_part: I6
- check_launch(*leases[i], counts[i], resolved[i]);
+ if (i == 0) check_launch(*leases[i], counts[i], resolved[i]);
launch_of_one_twice: I6 order-of-calls
- if (std::exchange(lease.batch, batch_) == batch_)
+ if (false)
refused_launch_keeps_slot: I6 leak-on-refusal
- counters_.refused_launches.add();
+ counters_.refused_launches.add();
+     if (arena_.free_slots() > 0) arena_.take_slot();
asking_not_counted: learned
-   placement_.taken(cut);
no_room_for_pages_needed: more-than-owned
- if (missing > 0 && !make_room_for_pages
+ if (missing > 1 && !make_room_for_pages
left_for_a_launch_unsaid: I12
- if (admission_.make_room({0, pages}, Cause::launch)) return true;
+ if (admission_.make_room({0, pages}, Cause::reserve)) return true;
taken_back_unsaid: I12
- Cause::taken_back
+ Cause::launch
left_after_a_taken_back_unsaid: I12
- return admission_.make_room({0, pages}, Cause::launch);
+ return admission_.make_room({0, pages}, Cause::taken_back);
boundary_not_taken_back: no-spare-slot
- if (!could_take_back || !
+ if (!false || !
takes_back_what_others_read: I5 donated-written
- lease.read->checkpoint->pins == 1
+ true
takes_back_before_the_tail_copy: I11
- lease.due_tail.source == kNone && lease.read->checkpoint
+ lease.read->checkpoint
takes_back_in_vain: I6
- !admission_.feasible({-1, pages})
+ false
goes_on_in_the_boundary: I5 live-published donated-written
- if (!lease.steps.empty() && lease.steps.back().kind) {
+ if (false) {
goes_on_from_nothing: I2 zero-state
- return last.write_slot;
+ return kNone;
restores_nothing: I2 zero-state
- return lease.read == nullptr ? kNone : lease.read->checkpoint->slot;
+ return kNone;
inner_states_in_reverse: I2 state-too-far
- step.checkpoints.push_back({wanted.position, *slot, wanted.kind});
+ step.checkpoints.push_back({wanted.position, *slot, wanted.kind});
+       if (step.checkpoints.size() == 2) std::swap(step.checkpoints[0].slot, step.checkpoints[1].slot);
tail_copied_at_every_step: I5
- step.tail = std::exchange(lease.due_tail, {kNone, kNone});
+ step.tail = lease.due_tail;
state_copied_at_every_step: I2
-   lease.fresh = false;
-   lease.extra_passes
+   lease.extra_passes
pages_not_zeroed: not-zeroed
- if (arena_.dirty(page) && page != step.tail.destination)
+ if (false)
copied_page_zeroed: I11
- arena_.dirty(page) && page != step.tail.destination
+ arena_.dirty(page)
clean_pages_zeroed: not-zeroed
- arena_.dirty(page) && page != step.tail.destination
+ page != step.tail.destination
clean_before_the_plan: not-zeroed
- step.zero_pages.push_back(page);
+ step.zero_pages.push_back(page), arena_.clean(page);
never_clean: not-zeroed
- for (const PageId page : lease->new_pages) arena_.clean(page);
read_pin_until_the_launch: I5 I10
-   lease.fresh = false;
-   lease.extra_passes
+   lease.fresh = false;
+   release_read(lease);
+   lease.extra_passes
plans_pile_up: order-of-calls
- if (static_cast<std::int64_t>(pending_.size()) > options_.run_ahead) {
+ if (false) {
live_slot_not_zeroed: zero-state
- if (from_boundary && step.read_slot == kNone) plan.zero_slots.push_back(step.write_slot);
state_not_copied: I2 zero-state
- plan.copy_slots.push_back({step.read_slot, step.write_slot});
+ ;
state_copied_backwards: I5
- plan.copy_slots.push_back({step.read_slot, step.write_slot});
+ plan.copy_slots.push_back({step.write_slot, step.read_slot});
state_zeroed_instead: zero-state
- plan.copy_slots.push_back({step.read_slot, step.write_slot});
+ plan.zero_slots.push_back(step.write_slot);
tail_copy_not_planned: I11
- if (step.tail.source != kNone) plan.copy_pages.push_back(step.tail);
plans_out_of_order: order-of-calls not-written
- if (plan != pending_.front().number) {
+ if (false) {
applied_twice_refused: order-of-calls
- if (plan <= applied_) return;  // applied again
commit_without_the_plan: I4 not-written order-of-calls
- if (plan > applied_) {
+ if (false) {
too_many_tokens_accepted: I4 I6
- if (sum != static_cast<std::int64_t>(tokens.size())) {
+ if (sum > static_cast<std::int64_t>(tokens.size())) {
left_behind_never_freed: leftovers
- if (lease.left_behind != kNone) arena_.free_slot(std::exchange(lease.left_behind, kNone));
left_behind_freed_at_once: I10 late-write
- if (step.gone_on) leave_behind(lease, step.write_slot);
+ if (step.gone_on) arena_.free_slot(step.write_slot);
left_behind_forgotten: I1 leftovers
- if (step.gone_on) leave_behind(lease, step.write_slot);
checkpoint_is_no_option: optional-fails
- counters_.dropped_checkpoints.add(!spare);
-   return std::nullopt;
+ throw InvariantError("no slot for a checkpoint");
published_from_a_new_slot: live-published not-written I2
- publication.next = *slot;
+ publication.next = *slot, std::swap(publication.next, publication.state);
read_pin_never_released: leftovers I5
-   lease.committed = step.end;
-   release_read(lease);
+   lease.committed = step.end;
duplicate_inner_slot_kept: I1 leftovers
- arena_.free_slot(inner.slot);
-       counters_
+ counters_
computed_is_committed: I4 state-too-far
- lease.committed = step.end;
+ lease.committed = lease.computed;
inner_published_from_the_end: I2 state-too-far
- {inner.position, inner.slot, kNone, inner.kind}
+ {inner.position, publication.inner.back().slot, kNone, inner.kind}
state_of_the_page_edge: I2 other-depth
- extend_to(publication.kind ? lease.committed : std::max(paging().whole_at(whole), node->depth));
+ extend_to(std::max(paging().whole_at(whole), node->depth));
half_page_enters_the_tree: I4
- extend_to(publication.kind ? lease.committed : std::max(paging().whole_at(whole), node->depth));
+ extend_to(lease.committed);
donated_slot_stays_live: I5 donated-written
-       lease.live = publication.next;
+       if (publication.next != kNone) arena_.free_slot(publication.next);
goes_on_in_the_new_slot: I2 zero-state
- lease.live = publication.next;
-       lease.fresh = true;
+ lease.live = publication.next;
duplicates_freed_early: I1 duplicates-freed
-   tree_.pin(node);
-   tree_.unpin(std::exchange(lease.anchor, node));
+   for (Position i = 0; i < node->depth / paging().page_size; ++i) {
+     if (lease.owned[i]) arena_.release_page(lease.pages[i]), lease.owned[i] = false;
+   }
+   tree_.pin(node);
+   tree_.unpin(std::exchange(lease.anchor, node));
page_table_changes: duplicates-freed
-   tree_.pin(node);
-   tree_.unpin(std::exchange(lease.anchor, node));
+   for (Position i = 0; i < node->depth / paging().page_size; ++i) {
+     if (!lease.owned[i]) continue;
+     arena_.release_page(std::exchange(lease.pages[i], tree_.path_page(node, i)));
+     lease.owned[i] = false;
+   }
+   tree_.pin(node);
+   tree_.unpin(std::exchange(lease.anchor, node));
anchor_stays: I4
-   tree_.pin(node);
-   tree_.unpin(std::exchange(lease.anchor, node));
tail_of_the_neighbour: I11 tail-evicted
- : lease.pages[number]);
+ : lease.pages[number > 0 ? number - 1 : 0]);
tail_is_the_duplicate: tail-evicted duplicates-freed
- number < whole ? tree_.path_page(node, number) : lease.pages[number]
+ lease.pages[number]
no_tail: I11
- if (each->depth > number * paging().page_size)
+ if (false)
breakpoint_superseded: wrong-victim
- && last->checkpoint && last->checkpoint->kind != Kind::breakpoint;
-   if (serves_it
+ && last->checkpoint;
+   if (serves_it
branching_point_superseded: wrong-victim deep-fork
- if (serves_it && last->children.size() == 1)
+ if (serves_it)
nothing_superseded: wrong-victim
- if (serves_it && last->children.size() == 1) tree_.supersede(last);
boundary_stays: wrong-victim
- lease.course.boundary = node->depth;
applied_not_in_the_digest: I7
- digest_.mix(kApplied, plan);
launch_not_in_the_digest: I7
- digest_.mix(kLaunch, static_cast<std::uint64_t>(step.end) << 20 ^ lease.id);
"""

CLOSE = r"""
closed_lease_used_as_it_was: I4
- closed->clear();
inner_slots_kept_at_the_end: I1 leftovers
-     for (const auto& inner : step.checkpoints) arena_.free_slot(inner.slot);
rows_kept_at_the_end: I1 leftovers
- {&step.rows, &step.kept}
+ {&step.kept}
passed_rows_kept_at_the_end: I1 leftovers
- {&step.rows, &step.kept}
+ {&step.rows}
close_publishes_an_open_step: I4 state-too-far
- const bool publishes = lease.steps.empty() && !lease.fresh
+ const bool publishes = !lease.fresh
close_publishes_a_fresh_slot: not-written
- lease.steps.empty() && !lease.fresh && kept
+ lease.steps.empty() && lease.committed > lease.course.boundary - 1 && kept
discard_publishes: cap I4
- kept && !discard;
+ kept;
keep_ignored: cap
- kept && !discard;
+ !discard;
keep_prompt_is_all: cap
- (keep == Keep::prompt && lease.committed <= length)
+ keep == Keep::prompt
keep_nothing_stays_worthy: cap
- if (retire && last->children.empty()) tree_.supersede(last);
retires_what_it_resumed_from: wrong-victim
- && last->checkpoint->tick == lease.made;
+ ;
no_rest: I10 late-write
- if (plan != 0) {
+ if (false) {
rest_ends_at_its_plan: I10 late-write
- applied_ < plan + options_.run_ahead;
+ applied_ < plan;
rest_ends_with_the_plans: I10 late-write
- !pending_.empty() || open_steps_ > 0;
+ !pending_.empty();
rest_never_ends_idle: leftovers
- return in_flight && applied_
+ return applied_
uncollected_step_runs: I10 leftovers
-   std::erase(launched_, &lease);  // what no plan has collected is never booked
rest_until_the_uncollected: I10 leftovers
- if (step->plan < next_plan_) return step->plan;
+ return step->plan;
slot_gone_on_from_kept: I1 leftovers
- if (step.gone_on) arena_.free_slot(step.write_slot);
pages_kept_at_the_end: I1 leftovers
- if (lease.owned[i]) arena_.release_page(lease.pages[i]);
anchor_pinned_for_ever: leftovers
-   tree_.unpin(lease.anchor);
contents_stay: leftovers I8
- if (lease.has_content) contents_.release(lease.tokens);
close_ignores_cap: cap
-   end_rests();
-   trim_to_cap();
- }
+   end_rests();
+ }
rest_ignores_cap: cap
- if (!ended.empty()) trim_to_cap();
"""

VERIFY = r"""
drafts_inside_the_prompt: I4
- lease.computed >= lease.course.prompt_length && count >= 2
+ count >= 2
no_default_rows: drafts
- count <= options_.draft_tokens + 1;
+ count <= options_.draft_tokens;
rows_for_long_steps: drafts
- count >= 2 && count <= options_.draft_tokens + 1;
+ count >= 2 && options_.draft_tokens > 0;
one_token_behind_drafts_is_ordinary: I5 drafts
- may_draft || lease.behind_verify_step() ? count : 0
+ may_draft ? count : 0
more_rows_than_drafts: drafts
- rows > std::min(count, most)
+ rows > count
more_rows_than_tokens: drafts
- rows > std::min(count, most)
+ rows > most
rows_inside_the_prompt: I4 drafts
- if (rows > 0 && lease.computed < lease.course.prompt_length) refuse("0 inside the prompt");
rows_without_drafts: drafts
- options_.draft_tokens == 0 ? 0 : options_.draft_tokens + 1
+ options_.draft_tokens + 1
launch_behind_the_void: order-of-calls drafts
- if (before.is_void)
+ if (false)
ordinary_behind_drafts: I5 drafts
- if (rows == 0) refuse(
+ if (false) refuse(
some_rows_where_begin_is_unknown: drafts
- before.rows.size() > 1 && rows != count
+ false
candidates_of_the_live_slot: zero-state drafts
- step.candidates = lease.steps.back().rows;
+ step.candidates.assign(lease.steps.back().rows.size(), lease.live);
begin_too_low: drafts
- static_cast<Position>(step.candidates.size()) - 1;
+ static_cast<Position>(step.candidates.size());
begin_is_the_highest: drafts
-     step.begin -= static_cast<Position>(step.candidates.size()) - 1;
uncovered_boundary_passed: I2 state-too-far
- if (known && !uncovered.empty()) {
+ if (false) {
uncovered_by_the_last: state-too-far
- count = uncovered.front().position - step.begin;
+ count = uncovered.back().position - step.begin;
covered_boundary_shortens: drafts
- wanted_in(step.begin, step.begin + count - rows)
+ wanted_in(step.begin, step.begin + count)
rows_longer_than_the_step: drafts
-     rows = std::min(rows, count);
pages_of_the_lowest_begin: I5 I11
- paging().spanned(step.begin_max + count)
+ paging().spanned(step.begin + count)
no_room_for_rows_needed: more-than-owned
- make_room({rows, missing}
+ make_room({0, missing}
one_row_too_few_asked_for: more-than-owned
- make_room({rows, missing}
+ make_room({rows - 1, missing}
left_for_rows_unsaid: I12
- Cause::launch
+ Cause::reserve
reads_the_last_row: zero-state drafts
- behind ? step.candidates.front() : source(lease)
+ behind ? step.candidates.back() : source(lease)
writes_the_live_slot: I5 drafts
- step.write_slot = step.rows.back();
+ step.write_slot = lease.live;
row_not_copied: zero-state drafts
- known && rows == 1
+ false
rows_copied: drafts
- known && rows == 1
+ known
copied_from_an_unknown_row: zero-state drafts
- known && rows == 1
+ rows == 1
void_accepts_tokens: I4
- if (step.is_void && count != 0) refuse
+ if (false) refuse
more_accepted_than_drafted: I4
- count > length)
+ false)
fewer_accepted_than_rows: I4
- count < least ||
+
rejected_drafts_committed: I4 state-too-far
- lease.committed = step.begin + stay;
+ lease.committed = step.end;
rejected_rows_kept: I1 leftovers
-   for (const SlotId row : step.rows) arena_.free_slot(row);
- }
+ }
computed_stays_ahead: I4
-     lease.computed = lease.committed;
-   } else
+   } else
end_of_the_next_stays: I4 drafts
-     next.end += lease.committed - next.begin;
begin_of_the_next_stays: I4 drafts
-     next.begin = next.begin_max = lease.committed;
computed_ignores_the_next: I4 drafts
-     lease.computed = next.end;
read_pin_after_drafts: I1 leftovers
-     release_read(lease);
-     const auto publication
+     const auto publication
void_rows_freed_under_the_next: I10 late-write
- (nothing_stays || next->plan == next_plan_)
+ (next->plan == next_plan_)
rows_freed_under_the_uncollected: I10 late-write
- (nothing_stays || next->plan == next_plan_)
+ (nothing_stays)
rows_kept_too_long: reserved-slots drafts
- (nothing_stays || next->plan == next_plan_)
+ true
kept_rows_lost: I1 leftovers
-     next->kept = std::move(step.rows);
kept_rows_stay: I1 leftovers
-   for (const SlotId row : step.kept) arena_.free_slot(row);
void_forgotten: I4 drafts
-     next->is_void |= nothing_stays;
row_after_the_boundary: I2 state-too-far
- step.rows.at(at - first)
+ step.rows.at(std::min<Position>(at - first + 1, std::ssize(step.rows) - 1))
last_accepted_row_published: I2 state-too-far
- {wanted.position, take_row(wanted.position), wanted.kind}
+ {wanted.position, take_row(lease.committed), wanted.kind}
last_drafted_row_published: I2 state-too-far
- step.rows.at(at - first)
+ step.rows.at(at == lease.committed ? std::ssize(step.rows) - 1 : at - first)
rows_of_boundaries_dropped: drafts
- } else if (wanted.position < lease.committed) {
+ } else if (false) {
boundary_beyond_what_stays: I4 state-too-far
- wanted_in(step.begin, lease.committed)
+ wanted_in(step.begin, step.end)
duplicate_row_published: I1
- if (known_checkpoint(lease, wanted.position)) {
+ if (false) {
accepted_row_not_live: zero-state drafts
-     arena_.free_slot(std::exchange(lease.live, take_row(lease.committed)));
accepted_state_read_from_the_boundary: zero-state drafts
-     lease.fresh = false;
-   }
-   return publication;
+   }
+   return publication;
wanted_anywhere: drafts
- if (position <= lease.computed && !at_open_end && !has_row) {
+ if (false) {
wanted_at_a_row_refused: drafts
- has_row = position > oldest.end
+ has_row = position > lease.computed && position > oldest.end
wanted_at_the_open_end_refused: drafts
- const bool at_open_end = position == lease.computed &&
+ const bool at_open_end = false &&
wanted_at_the_open_end_is_spare: drafts
-     lease.steps.back().spare = false;
"""

PAGE_TABLE = r"""
seen_table_used_again: I7 duplicates-freed
- if (pages_.use_count() != 1)
+ if (pages_ == nullptr)
grows_what_others_see: I7
- && pages_.use_count() > 1) {
+ && false) {
"""

FILES = {
    "csrc/page_table.h": PAGE_TABLE,
    "csrc/steps.cpp": STEPS,
    "csrc/close.cpp": CLOSE,
    "csrc/verify.cpp": VERIFY,
}
