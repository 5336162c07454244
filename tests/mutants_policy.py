"""The mutants of what is learned: csrc/history.cpp, hazard.cpp. Data only, in the form of mutants_list.py."""

from __future__ import annotations

HISTORY = r"""
hit_on_a_shallower_one_is_a_use: wrong-victim
- const auto common = next == nullptr ? 0 : common_prefix(next->edge, below);
+ const auto common = next == nullptr || next->node == nullptr ? 0 : common_prefix(next->edge, below);
whole_prompt_is_an_exit: I3
- rest.first(rest.empty() ? 0 : rest.size() - 1)
+ rest
no_first_branch: first-branch
- if (branches) trail.left
+ if (false) trail.left
use_opens_no_spell: learned
-   exit->gap = trail.gap;
-   open_spell(exit);
+   exit->gap = trail.gap;
ghost_keeps_its_index: wrong-victim deep-fork
-   give(record, record->index + record->flow);
time_stands_still: learned
-   ++now_;
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
roots_stay: leftovers
- if (last->root()) forget_root(last);
+
content_not_held: I8 key-dropped
-   contents_.acquire(edge);
announced_return_ignored: learned
-   record->hint = hint;
hint_outlives_the_return: learned
-   record->hint = Hint::none;
-   record->which
+   record->which
passed_stays_in_its_class: learned
-   hazards_.moved(before, record->which, record->bucket);
"""

HAZARD = r"""
index_of_now_only: learned
- if (alive < kOne / 1024) break;
+ break;
kinds_are_alike: learned
- by_kind ? kRarer[static_cast<int>(kind)] : 1
+ 1
uses_are_not_counted: learned
-     table->events[bucket] += events;
what_moves_counts_twice: learned
- if (before[level] == after[level]) continue;
+
"""

FILES = {"csrc/history.cpp": HISTORY, "csrc/hazard.cpp": HAZARD}
