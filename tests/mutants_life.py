"""The mutants of a request's life: csrc/cache.cpp and steps.cpp. Data only, in the
form of mutants_list.py.
"""

from __future__ import annotations

CACHE = r"""
match_whole_prompt: I3
- return to_match(tree_.walk(root, prompt.tokens, length - 1), length);
+ return to_match(tree_.walk(root, prompt.tokens, length), length);
reserve_whole_prompt: I3
- std::span<const Token>(keyed), length - 1);
+ std::span<const Token>(keyed), length);
match_touches: I9
- return to_match(tree_.walk(root, prompt.tokens, length - 1), length);
+ {
+     const auto walk = tree_.walk(root, prompt.tokens, length - 1);
+     if (walk.resume != nullptr) const_cast<Tree&>(tree_).touch(walk.resume);
+     return to_match(walk, length);
+   }
match_makes_a_root: I9
- const Node* root = tree_.find_root(prompt.salt);
+ const Node* root = const_cast<Tree&>(tree_).make_root(prompt.salt);
match_without_salt: I8 key-dropped
- const Node* root = tree_.find_root(prompt.salt);
+ const Node* root = tree_.find_root({});
reserve_without_salt: I8 key-dropped
- const auto walk = tree_.walk(tree_.find_root(prompt.salt),
-                                keyed.empty()
+ const auto walk = tree_.walk(tree_.find_root({}),
+                                keyed.empty()
root_without_salt: I8 key-dropped
- tree_.make_root(salt)
+ tree_.make_root({})
pin_without_salt: I8 key-dropped
- tree_.walk(tree_.find_root(prompt.salt), keyed,
+ tree_.walk(tree_.find_root({}), keyed,
match_without_content: I8 key-dropped
- tokens[key.position] = contents_.find(tokens[key.position], key.content);
+ static_cast<void>(key);
lease_without_content: I8 key-dropped
- token = contents_.acquire(token, key.content);
+ token = contents_.acquire(token, {});
fork_without_content: I8 leftovers
- if (child->has_content) contents_.acquire(rest);
clear_crosses_salts: I8
- if (!salt || *root->salt == *salt) eviction_
+ eviction_
reason_remainder_lost: I12
- } else if (walk.checkpoint_at_end) {
+ } else if (false) {
reason_complete_lost: I12
- } else if (resumed == length - 1) {
+ } else if (false) {
reason_unknown_lost: I12
- } else if (resumed == walk.matched) {
+ } else if (false) {
diverged_lost: I12 first-branch
- return {resumed, walk.matched, reason, walk.ways};
+ return {resumed, walk.matched, reason, 0};
match_of_the_longer: I12 longer-index
- if ((*node)->depth < match.length) lease->match =
+ if (false) lease->match =
refusal_keeps_read_pin: I6 leak-on-refusal
- if (node != nullptr) tree_.unpin_checkpoint(node);
refusal_keeps_pin: I6 leak-on-refusal
- tree_.unpin(at);
-     if
+ if
lone_request_refused: no-spare-slot
- if (node == nullptr || !leases_.empty()) return std::nullopt;
+ return std::nullopt;
gives_up_hit_beside_others: I6
- if (node == nullptr || !leases_.empty())
+ if (node == nullptr)
two_slots_a_request: reserved-slots
- make_room({1, pages - at->depth
+ make_room({2, pages - at->depth
own_hit_is_room: I6
- pages - at->depth / options_.page_size}, at)
+ pages - at->depth / options_.page_size}, nullptr)
pages_of_the_hit_needed_too: reserved-slots
- pages - at->depth / options_.page_size}
+ pages}
tail_not_copied: I11 I5
- lease.due_tail = {node->checkpoint->tail, lease.pages[start / options_.page_size]};
tail_copied_to_the_last_page: I11
- {node->checkpoint->tail, lease.pages[start / options_.page_size]}
+ {node->checkpoint->tail, lease.pages.back()}
restore_does_not_touch: wrong-victim
-   tree_.touch(node);
- }
+ }
use_not_counted: learned
- placement_.used(kind);
turn_branches: learned
- kind != Kind::turn_end && kind != Kind::prompt_end
+ kind != Kind::turn_end
pages_unscrubbed: not-zeroed
- lease.new_pages.push_back(lease.pages.back());
pins_are_room: I6
- for (const auto& [id, pin] : pins_) path(pin);
tails_are_room: I6 more-than-owned
- visit(node->checkpoint->tail);
+ ;
fork_shares_the_live_slot: I5 donated-written
- resume(*child, source, pages);
+ resume(*child, source, pages);
+   arena_.free_slot(std::exchange(child->live, parent.live));
fork_without_read_pin: I5
- source = parent.read;
-     tree_.pin_checkpoint(source);
+ source = parent.read;
fork_of_one_slot: more-than-owned
- make_room({1 + publishes, pages - at
+ make_room({1, pages - at
refused_fork_keeps_pin: I6 leak-on-refusal
- if (!publishes && at > 0) tree_.unpin_checkpoint(source);
fork_wants_nothing: first-branch
- if (wanted.position > at) child->course
+ if (false) child->course
fork_of_the_page_below: I2
- tree_.find(parent.anchor, parent.span(parent.anchor->depth, at))
+ parent.anchor
pin_does_not_pin_the_state: I5
- tree_.pin_checkpoint(walk.resume);
-   pins_
+ pins_
release_ignores_cap: cap
- counters_.pins.add(-1);
-   trim_to_cap();
+ counters_.pins.add(-1);
cap_ignored: cap
- if (options_.max_cached_bytes < 0) return;
+ return;
cap_counts_states_only: cap
- return arena_.counted_pages() * options_.page_bytes +
+ return
"""

STEPS = r"""
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
- for (std::size_t i = 0; i < leases.size(); ++i) check_launch(
+ for (std::size_t i = 0; i < 1 && i < leases.size(); ++i) check_launch(
launch_of_one_twice: I6 order-of-calls
- if (!seen.insert(id).second)
+ if (false)
refused_launch_keeps_slot: I6 leak-on-refusal
- counters_.refused_launches.add();
+ counters_.refused_launches.add();
+     if (arena_.free_slots() > 0) arena_.take_slot();
asking_not_counted: learned
-   placement_.taken(cut);
no_room_for_pages_needed: more-than-owned
- if (missing > 0 && !make_room_for_pages(lease, missing)) {
+ if (missing > 1 && !make_room_for_pages(lease, missing)) {
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
- !admission_.feasible({-1, pages}, nullptr)
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
-   step.tail
+   step.tail
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
- for (const PageId page : lease.new_pages) arena_.clean(page);
read_pin_until_the_launch: I5 I10
-   lease.fresh = false;
-   step.tail
+   lease.fresh = false;
+   release_read(lease);
+   step.tail
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
- if (due != static_cast<std::int64_t>(tokens.size())) {
+ if (due > static_cast<std::int64_t>(tokens.size())) {
left_behind_never_freed: leftovers
- if (lease.left_behind != kNone) arena_.free_slot(std::exchange(lease.left_behind, kNone));
left_behind_freed_at_once: I10 late-write
- if (step.gone_on) lease.left_behind = step.write_slot;
+ if (step.gone_on) arena_.free_slot(step.write_slot);
left_behind_forgotten: I1 leftovers
- if (step.gone_on) lease.left_behind = step.write_slot;
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
- extend_to(publication.kind ? lease.committed : std::max(full * page_size, node->depth));
+ extend_to(std::max(full * page_size, node->depth));
half_page_enters_the_tree: I4
- publication.kind ? lease.committed : std::max(full * page_size, node->depth)
+ lease.committed
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
+   for (Position i = 0; i < node->depth / page_size; ++i) {
+     if (lease.owned[i]) arena_.release_page(lease.pages[i]), lease.owned[i] = false;
+   }
+   tree_.pin(node);
+   tree_.unpin(std::exchange(lease.anchor, node));
page_table_changes: duplicates-freed
-   tree_.pin(node);
-   tree_.unpin(std::exchange(lease.anchor, node));
+   for (Position i = 0; i < node->depth / page_size; ++i) {
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
- number < full ? tree_.path_page(node, number) : lease.pages[number]
+ lease.pages[number]
no_tail: I11
- if (each->depth % page_size != 0)
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
-   std::erase(launched_, id);  // what no plan has collected is never booked
rest_until_the_uncollected: I10 leftovers
- if (step->plan < next_plan_) return step->plan;
+ return step->plan;
inner_slots_kept_at_the_end: I1 leftovers
-     for (const auto& inner : step.checkpoints) arena_.free_slot(inner.slot);
-   }
-   for
+   }
+   for
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
applied_not_in_the_digest: I7
- digest_.mix(kApplied, plan);
launch_not_in_the_digest: I7
- digest_.mix(kLaunch, static_cast<std::uint64_t>(step.end) << 20 ^ lease.id);
"""

FILES = {
    "csrc/cache.cpp": CACHE,
    "csrc/steps.cpp": STEPS,
}
