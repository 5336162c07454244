"""The mutants of what is kept and what leaves: arena, tree, eviction, admission. Data only, in the form of
mutants_list.py.
"""

from __future__ import annotations

ID_SET = r"""
highest_free_id: I7 pointer-order
- std::countr_zero((*words)[id])
+ 63 - std::countl_zero((*words)[id])
ids_lost_with_the_first_of_their_word: I6
- if (word != 0) return;
+ static_cast<void>(word);
ids_unknown_above_their_word: I6
- if (had_any) return;  // so it is known above
+ return static_cast<void>(had_any);
"""

ARENA = r"""
emptiest_slab_first: I7
- return partial_.begin()->second;
+ return partial_.rbegin()->second;
home_forgotten: I7
- if (home != kNone && has_free_page(home)) return home;
slab_of_a_slot_stays_clean: not-zeroed
- std::fill(dirty_.begin() + first, dirty_.begin() + first + pages_per_slab_, true);
+ static_cast<void>(first);
pages_clean_at_first: not-zeroed
- dirty_.assign(pages, true);
+ dirty_.assign(pages, false);
counted_page_freed: I1 I5 late-write
- if (use.taken()) return;
+ if (use.held) return;
held_page_freed: I1 I5 tail-evicted
- if (use.taken()) return;
+ if (use.of_tree()) return;
page_freed_with_its_first_tail: I5 tail-evicted
- --use.tails;
+ use.tails = 0;
tail_pinned_once_for_all: I5
- ++use.pinned_tails;
+ use.pinned_tails = 1;
loose_pages_uncounted: I1 I6
- loose_pages_.add(use.loose() - before.loose());
slots_are_no_pages: more-than-owned two-budgets
- (taken_slots() + slots) * pages_per_slab_
+ taken_slots() * pages_per_slab_
never_large_enough_unnoticed: I6
- (num_slots() - slots) * pages_per_slab_ >= pages
+ num_slots() * pages_per_slab_ >= pages
slots_not_asked_for: more-than-owned
- return free_slots() >= slots && free_pages(slots) >= pages;
+ return free_pages(slots) >= pages;
slabs_with_pages_only_grow: I1
- slabs_with_pages_.add((used > 0) - (s.used > 0));
+ slabs_with_pages_.add(used > 0 && s.used == 0);
page_not_in_the_digest: I7
- digest_.mix(kTakePage, page);
joined_page_still_held: I1
- use.node = true;
-     use.held = false;
+ use.node = true;
"""

ARENA_H = r"""
tail_of_the_pinned_is_loose: I6 more-than-owned
- tails > 0 && pinned_tails == 0 && !node && !held
+ tails > 0 && !node && !held
tail_of_a_node_is_loose: I6 more-than-owned
- pinned_tails == 0 && !node && !held
+ pinned_tails == 0 && !held
tail_of_its_writer_is_loose: I6 more-than-owned
- pinned_tails == 0 && !node && !held
+ pinned_tails == 0 && !node
"""

EDGE = r"""
small_parts_stay: I2
- || part->size + part->next->size > small) return;
+ || part->size + part->next->size > 2) return;
joined_part_not_counted: I2
-   part->size = size;
+
part_grows_where_it_stood: I2
-   link(part->before, part);
+
last_tokens_from_the_first_of_their_part: I4 other-depth
- return {part, begin - from, count};
+ return {part, 0, count};
last_tokens_from_the_part_before: I4 other-depth
- for (; skip >= part->size; part = part->next)
+ for (; skip > part->size; part = part->next)
last_tokens_from_the_next_part: I4 other-depth
- while (from > begin) {
+ while (from > begin + 1) {
lower_tokens_not_moved_up: I2 other-depth
-   std::memmove(part->tokens(), part->tokens() + count, others * sizeof(Token));
front_stays_linked: I2
-   part->before = nullptr;
front_keeps_its_small_parts: I2
-   front.join(front.tail_->before, small);
appended_edge_not_counted: I2
- size_ += std::exchange(below.size_, 0);
+ below.size_ = 0;
"""

TREE = r"""
kind_of_what_left_stays: I1
- by_kind_[index(node->checkpoint->kind)].add(-1);
taken_back_stays_pinned: I5
- if (node->checkpoint->pins > 0) pinned_changed(*node, false);
pinned_twice_counts_twice: I5
- if (node->checkpoint->pins++ == 0) pinned_changed(*node, true);
+ ++node->checkpoint->pins, pinned_changed(*node, true);
a_part_compared_in_find: I2 other-depth
- if (common_prefix(from->edge.all(), tokens) < from->edge.size()) return nullptr;
+ if (common_prefix(from->edge.all().head(), tokens) < from->edge.all().head().size()) return nullptr;
find_does_not_compare: I2 other-depth
- if (common_prefix(from->edge.all(), tokens) < from->edge.size()) return nullptr;
content_released_too_early: I8 key-dropped
- if (leaf->has_content) contents_.acquire(edge);
content_never_released: I8 leftovers
- if (token >= 0 || --entries_[slot(token)].users > 0) continue;
+ continue;
content_of_the_token_only: I8 key-dropped
- ids_.try_emplace({token, content}, kUnknown)
+ ids_.try_emplace({token, {}}, kUnknown)
content_lost_at_a_merge: I8
- child->has_content |= node->has_content;
content_lost_at_a_split: I8
- upper->has_content = node->has_content;
walk_ignores_the_limit: I3 longer-index
- if (node->checkpoint && node->depth <= limit)
+ if (node->checkpoint)
walk_stops_below_the_limit: identical-prompt
- node->depth <= limit
+ node->depth < limit
walk_into_children: I2 into-children
- walk.ways = walk.matched < length ? 1 : 0;
-       break;
+ walk.ways = walk.matched < length ? 1 : 0;
diverged_at_the_end: I12
- walk.ways = walk.matched < length ? 1 : 0;
+ walk.ways = 1;
first_checkpoint_wins: longer-index deep-fork
- if (node->checkpoint && node->depth <= limit) walk
+ if (node->checkpoint && node->depth <= limit && walk.resume == nullptr) walk
page_of_the_next_node: I11 tail-evicted
- while (paging_.whole(node->begin()) > number) node
+ while (paging_.whole(node->begin()) > number && node->begin() % paging_.page_size == 0) node
page_counted_by_nobody: I1 I5
- arena_.join_node(from.table[page]);
+ arena_.release_page(from.table[page]);
joined_page_still_owned: I1 duplicates-freed
- from.owned[page] = false;
split_lifts_the_state: I2 other-depth
-   node->parent = upper;
+   node->parent = upper;
+   upper->checkpoint = std::exchange(node->checkpoint, std::nullopt);
split_by_rounded_pages: I11
- paging_.whole(at) - paging_.whole(node->begin())
+ paging_.whole(at - node->begin())
split_keeps_pages_below: I1
- node->pages.erase(node->pages.begin(), node->pages.begin() + pages);
merge_loses_pages: I1 I11
- node->pages.insert(node->pages.end(), child->pages.begin(), child->pages.end());
prune_ignores_pins: I1 leftovers
- if (node->checkpoint || node->pins > 0 || node
+ if (node->checkpoint || node
nothing_pruned: leftovers
- if (--node->pins == 0) settle(node);
+ --node->pins;
pruned_pages_stay_counted: I1 leftovers
- for (const PageId page : node->pages) arena_.leave_node(page);
root_stays: leftovers
- if (node->children.empty() && node->pins == 0) remove_root(node);
new_leaf_not_told: dangling-order
- if (parent->children.empty()) leaf_changed(parent);
new_child_not_told: dangling-order two-budgets
- if (parent->children.size() == 1) leaf_changed(parent);
order_keeps_what_left: dangling-order
-   watcher_->leaving(*node, why);
pruned_pages_not_told: mirror
- if (holdings_watcher_ != nullptr) holdings_watcher_->pages_leaving(*node);
evicted_state_not_told: mirror
- if (holdings_watcher_ != nullptr) holdings_watcher_->checkpoint_leaving(*node);
order_by_address: I7 pointer-order
-   node->checkpoint->tick = ++tick_;
-   checkpoints_.add();
+   node->checkpoint->tick = reinterpret_cast<std::uintptr_t>(node) ^ ++tick_;
+   checkpoints_.add();
tail_not_counted: I1 tail-evicted
-   arena_.add_tail(page);
tail_of_the_pinned_set_unpinned: I5
- if (node->checkpoint->pins > 0) arena_.pin_tail(page);
evicted_tail_stays_counted: I1 tail-evicted leftovers
- if (tail != kNone) arena_.drop_tail(tail);
held_without_its_state: I5
- if (node->checkpoint) pin_checkpoint(node);
let_go_of_the_node_only: I6 leak-on-refusal
- if (node->checkpoint) unpin_checkpoint(node);
hit_touches_the_path: whole-path
-   node->checkpoint->tick = ++tick_;
-   ++node->checkpoint->uses;
+   for (Node* up = node->parent; up != nullptr; up = up->parent) {
+     if (!up->checkpoint) continue;
+     up->checkpoint->tick = ++tick_;
+     watcher_->changed(*up);
+   }
+   node->checkpoint->tick = ++tick_;
+   ++node->checkpoint->uses;
hit_stays_superseded: wrong-victim
-   node->checkpoint->superseded = false;
hit_does_not_renew: wrong-victim
-   node->checkpoint->tick = ++tick_;
-   ++node->checkpoint->uses;
+   ++node->checkpoint->uses;
"""

EVICTION = r"""
pins_are_room: I6
- node->parent != nullptr && node->pins == 0; node
+ node->parent != nullptr; node
half_gone_is_gone: I6
- if (node->children.size() > 1 && ++gone[node] < node->children.size()) break;
only_leaves_leave: two-budgets
- if (!visit(*node)) return;
+ if (!visit(*node)) return;
+       break;
superseded_stay_longest: wrong-victim
- checkpoint.superseded ? 0 : 1
+ checkpoint.superseded ? 1 : 0
lru_ranks: wrong-victim
-     case Policy::lru:
-     case Policy::marconi:
-       return 1;
-     case Policy::supersede:
+     case Policy::marconi:
+       return 1;
+     case Policy::lru:
+     case Policy::supersede:
breakpoint_evicts_nothing_of_worth: first-branch optional-fails
- replaces_any(kind) || options_.policy == Policy::learned ? kAny : 1
+ options_.policy == Policy::learned ? kAny : 1
optional_evicts_anything: wrong-victim
- replaces_any(kind) || options_.policy == Policy::learned ? kAny : 1
+ kAny
worth_of_the_whole_depth: wrong-victim
- node.depth - (above == nullptr ? 0 : above->depth)
+ node.depth
worth_without_its_pages: wrong-victim two-budgets
- if (node.children.empty()) bytes += node.pages.size() * options_.page_bytes;
pages_of_others_leave_with_it: wrong-victim two-budgets
- if (node.children.empty()) bytes += node.pages.size()
+ bytes += node.pages.size()
flow_worth_nothing: wrong-victim deep-fork
- (options_.has(Part::flow) ? checkpoint.record->flow : 0)
+ 0
index_worth_nothing: wrong-victim
- checkpoint.record->index + (options_
+ (options_
old_worth_of_what_is_below: dangling-order wrong-victim
-   place(node);
-   place_below(node);
+   place(node);
no_fallback_while_away: wrong-victim
-   if (checkpoint.record != nullptr) share(node, key.first);
share_of_what_is_sure_to_stay: wrong-victim
- * ratio >> 8
+
everyone_gives_a_share: wrong-victim
- record->hint == Hint::returns ? (
+ true ? (
pinned_can_leave: I5
-   if (checkpoint.pins > 0) {
-     drop(node);
-     if (checkpoint.record != nullptr) history_.give(checkpoint.record, 0);
-     return;
-   }
newest_leaves: wrong-victim
- least->key.first < limit)) return least->node;
+ least->key.first < limit)) return order->entries().back().node;
rank_limit_ignored: wrong-victim
- (limit == kAny || least->key.first < limit)
+ true
worth_most_never_leaves: I6 cap
- (limit == kAny || least->key.first < limit)
+ (least->key.first < limit)
every_node_a_leaf: two-budgets dangling-order
- node.children.empty() ? leaves_.put(node, key) : leaves_.strike(node);
+ leaves_.put(node, key);
old_place_kept: dangling-order
-   order_.strike(node);
"""

HEAP = r"""
place_not_told: dangling-order
-     at(*entry.node) = static_cast<std::int32_t>(i);
+     if (at(*entry.node) < 0) at(*entry.node) = static_cast<std::int32_t>(i);
worth_more_stays_above: wrong-victim dangling-order
-     entries_[i].key = key;
-     less ? rise(i) : sink(i);
+     entries_[i].key = key;
+     rise(i);
worth_less_stays_below: wrong-victim dangling-order
-     entries_[i].key = key;
-     less ? rise(i) : sink(i);
+     entries_[i].key = key;
+     sink(i);
gap_filled_downwards_only: wrong-victim dangling-order
-     entries_[i] = last;
-     less ? rise(i) : sink(i);
+     entries_[i] = last;
+     sink(i);
gap_filled_upwards_only: wrong-victim dangling-order
-     entries_[i] = last;
-     less ? rise(i) : sink(i);
+     entries_[i] = last;
+     rise(i);
sinks_below_the_first_child: wrong-victim dangling-order
- const auto least = std::min_element(
+ const auto least = std::max_element(
"""

ADMISSION = r"""
evicts_before_it_knows: I6
- return feasible(need) && evict_until
+ return evict_until
spare_evicts: learned
- spare ? Eviction::kNothing : eviction_.limit(kind),
+ eviction_.limit(kind),
left_for_a_checkpoint_unsaid: I12
- Cause::checkpoint
+ Cause::reserve
passes_paid_in_vain: learned
- return arena_.satisfies(1, 0) || eviction_.lowest(eviction_.limit(kind), false) != nullptr;
+ return true;
states_leave_for_pages: two-budgets
- arena_.fixed() && arena_.free_slots() >= need.slots;
+ false;
slots_not_feasible_unnoticed: I6 two-budgets
- if (slabs <= 0) return pages_can_leave(pages);
+ if (slabs <= 0 || arena_.fixed()) return pages_can_leave(pages);
states_are_no_room: two-budgets
- arena_.free_slots() - unpinned;
+ arena_.free_slots();
slabs_never_empty: two-budgets
- return !arena_.fixed() && slabs_can_empty(slabs, pages);
+ return false;
loose_is_no_room: two-budgets
- pages -= arena_.loose_pages();
tails_are_room: I6 more-than-owned
- return std::span(node.pages).subspan(stays);
+ return static_cast<void>(stays), std::span(node.pages);
tail_of_two_leaves_twice: I6
- && tails.insert(tail).second
touched_slab_is_empty: I6
- == arena_.used(slab)
+ == 1
stops_at_half_of_what_is_missing: two-budgets
- return slabs > 0 || pages > 0;
+ return slabs > 0 && pages > 0;
"""

JOURNAL = r"""
content_told_as_an_id: mirror
- token = contents_.token(token);
salt_of_nobody_told: mirror key-dropped
- event.salt = *node->salt;
first_page_of_a_leaf_is_the_first_of_the_path: mirror
- if (number > 0) event.before
+ if (number > 0 && begin == node->begin()) event.before
state_on_a_page_edge_without_tokens: mirror
- (node.depth - 1) / paging_.page_size * paging_.page_size
+ node.depth / paging_.page_size * paging_.page_size
removed_from_the_top: mirror
- event.pages.assign(leaf.pages.rbegin(), leaf.pages.rend());
+ event.pages = leaf.pages;
untaken_events_without_bound: mirror leftovers
- if (ids_ > capacity_) {
+ if (false) {
dropped_events_unsaid: mirror
-     overflowed_ = true;
told_anew_on_top_of_the_old: mirror
- events_.assign(1, Event{Event::What::cleared});
+ events_.clear();
states_not_told_anew: mirror
- if (node.checkpoint) events_.push_back(checkpoint_of(node));
what_a_clear_replaces_counts: mirror
- ids_ -= ids_of(events_.back());
+ static_cast<void>(0);
told_anew_for_ever: mirror
-   overflowed_ = false;
tokens_count_nothing: mirror
- return 1 + std::ssize(event.pages) + std::ssize(event.tokens);
+ return 1 + std::ssize(event.pages);
"""

RADIX = r"""
parts_beyond_a_difference_count: I2 longer-index
-     if (here < left.head().size()) break;
first_part_compared_again: I2 longer-index
- common_prefix(left.head(), b.subspan(common))
+ common_prefix(left.head(), b)
a_quarter_compared: I2 key-dropped
- stride * sizeof(Token)) == 0
+ stride) == 0
strides_overlap: I2
- if (equal) i += stride;
+ if (equal) i += stride + 1;
"""

TRANSCRIPT = r"""
anchor_stays_where_a_node_was: I1 dangling-order
- while (node.followed) move_up
+ while (false) move_up
truncated_above_its_anchor: I2 other-depth
- while (node != nullptr && node->depth > length) node = node->parent;
+
table_of_a_longer_path: I1
- transcript.table.resize(node == nullptr ? 0 : paging_.whole(node->depth));
+
resumes_below_its_anchor_only: I3
- walk.resume == nullptr && above != nullptr
+ false && above != nullptr
resumes_beyond_the_limit: I3
- if (above->checkpoint && above->depth <= limit) walk.resume = above;
+ if (above->checkpoint) walk.resume = above;
cut_content_stays: I8
- contents_.release(std::span(transcript.tokens).subspan(length));
+
closed_content_stays: I8
- contents_.release(transcript.tokens);
+
relative_content: I8 key-dropped
- tokens[key.position - before], key.content
+ tokens[0], key.content
"""

FILES = {
    "csrc/transcript.cpp": TRANSCRIPT,
    "csrc/radix.h": RADIX,
    "csrc/id_set.h": ID_SET,
    "csrc/arena.cpp": ARENA,
    "csrc/arena.h": ARENA_H,
    "csrc/edge.cpp": EDGE,
    "csrc/tree.cpp": TREE,
    "csrc/journal.cpp": JOURNAL,
    "csrc/eviction.cpp": EVICTION,
    "csrc/heap.h": HEAP,
    "csrc/admission.cpp": ADMISSION,
}
