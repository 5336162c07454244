"""The mutants of what is learned: history, hazard, calendar. Data only, in the form of mutants_list.py."""

from __future__ import annotations

HISTORY = r"""
hit_on_a_shallower_one_is_a_use: wrong-victim
- const auto common = next == nullptr ? 0 : common_prefix(next->tokens(), below);
+ const auto common = next == nullptr || next->node == nullptr ? 0 : common_prefix(next->tokens(), below);
whole_prompt_is_an_exit: I3
- rest.first(rest.empty() ? 0 : rest.size() - 1)
+ rest
no_first_branch: first-branch
- if (reach.branches && options_.has(Part::forks)) trail.left
+ if (false) trail.left
the_shallowest_that_left: I12
- if (exit->left.cause != Cause::never_made) reach.left = exit;
+ if (exit->left.cause != Cause::never_made && reach.left == nullptr) reach.left = exit;
any_ghost_has_left: I12
- if (exit->left.cause != Cause::never_made) reach.left = exit;
+ reach.left = exit;
known_to_the_last_record: I12
-     reach.known += static_cast<Position>(common);
-     if (next == nullptr
+     if (next != nullptr && common == next->tokens().size()) reach.known += static_cast<Position>(common);
+     if (next == nullptr
left_since_the_first_request: I12
- now_ - left.request
+ now_
time_since_it_was_told: I12
- time_ - left.time}
+ time_}
untold_time_told: I12
- first_time_ < 0 ? -1 : time_}
+ time_}
kind_of_the_record_not_of_what_left: I12
- record->node->checkpoint->kind
+ record->kind
use_opens_no_spell: learned
-   exit->priority = priority;
-   open_spell(exit);
+   exit->priority = priority;
last_gap_only: learned
- (exit->gap * seen + trail.gap) / (seen + 1)
+ trail.gap
priority_ignored: learned
- scaled(index_of(*record), record->priority)
+ index_of(*record)
priority_stays: learned
-   exit->priority = priority;
priority_not_handed_down: learned
-   record->priority = trail.priority;
ghosts_looked_up_in_quarters: learned
- record->node == nullptr ? Hazards::first_age(record->bucket + 1)
+ false ? Hazards::first_age(record->bucket + 1)
residents_looked_up_late: learned
-   if (!options_.has(Part::ghosts)) return open_spell(record);  // nothing is known of the time between
-   schedule(record);
ghost_keeps_its_index: wrong-victim deep-fork
-   give(record, record->index + record->flow);
edge_of_a_ghost_still_lent: I1 dangling-order
-   keep_edge(record);
-   record->node = nullptr;
+   record->node = nullptr;
time_stands_still: learned
-   ++now_;
roots_stay: leftovers
- if (last->root()) forget_root(last);
+
content_not_held: I8 key-dropped
-   contents_.acquire(rest);
announced_return_ignored: learned
-   record->hint = hint;
hint_outlives_the_return: learned
-   record->hint = Hint::none;
-   record->which
+   record->which
passed_stays_in_its_class: learned
-   hazards_.moved(before, record->which, record->bucket);
"""

RECORDS = r"""
edge_lent_by_what_was_cut: I1 dangling-order
- if (record->parent->depth < at) keep_edge(record);
+ static_cast<void>(at);
oldest_are_never_forgotten: leftovers
- tokens_ > most_tokens_
+ false
residents_are_forgotten: leftovers
- record->node == nullptr && record->pins == 0
+ record->pins == 0
branching_points_are_forgotten: leftovers
- && record->children.size() < 2
+
forgotten_flow_stays: learned
-   flows_up(record, Rate{0} - record->index);
"""

HAZARD = r"""
every_quarter_looked_at: learned
- const bool steep = index(leaf, bucket + 1, 0) > 2 * index(leaf, bucket, 0);
+ const bool steep = true;
spike_not_seen_coming: learned
- const bool steep = index(leaf, bucket + 1, 0) > 2 * index(leaf, bucket, 0);
+ const bool steep = false;
index_of_now_only: learned
- || !options_.has(Part::horizon)) break;
+ || true) break;
a_bucket_is_new_to_its_end: learned
- kOne - hazard[bucket] / 4 * behind, used
+ kOne, used
slow_from_the_start: learned
- std::clamp<std::int64_t>(now / kEarly, 1, kRefresh)
+ kRefresh
turns_in_octaves: learned
- 2 * bits - 2 + ((value >> (bits - 2)) & 1)
+ 2 * bits - 2
kinds_are_alike: learned
- by_kind ? kRarer[static_cast<int>(kind)] : 1
+ 1
uses_are_not_counted: learned
-     ++table->events[bucket];
what_moves_counts_twice: learned
- if (before[level] == after[level]) continue;
+
"""

CALENDAR = r"""
latest_first: learned
- day.splice(day.end(),
+ day.splice(day.begin(),
a_day_too_late: learned
- std::min(due, now + kFarthest) %
+ std::min(due + 1, now + kFarthest) %
"""

FILES = {
    "csrc/history.cpp": HISTORY,
    "csrc/records.cpp": RECORDS,
    "csrc/hazard.cpp": HAZARD,
    "csrc/calendar.h": CALENDAR,
}
