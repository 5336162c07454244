"""The mutants of how a request begins: csrc/match.cpp and csrc/cache.cpp. Data only, in the form of
mutants_list.py.
"""

from __future__ import annotations

MATCH = r"""
match_whole_prompt: I3
- const auto walk = this->walk(prompt, symbols, length - 1);
+ const auto walk = this->walk(prompt, symbols, length);
match_touches: I9
- auto match = to_match(walk, length);
+ auto match = to_match(walk, length);
+   if (walk.resume != nullptr) const_cast<Tree&>(tree_).touch(walk.resume);
match_makes_a_root: I9
- const Node* root = tree_.find_root(prompt.salt);
+ const Node* root = const_cast<Tree&>(tree_).make_root(prompt.salt);
match_without_salt: I8 key-dropped
- const Node* root = tree_.find_root(prompt.salt);
+ const Node* root = tree_.find_root({});
walk_without_salt: I8 key-dropped
- const Node* root = tree_.find_root(prompt.salt);
+ const Node* root = tree_.find_root({});
ids_of_content_forged: I8 key-dropped
- if (contents_.size() == 0 && prompt.content_keys.empty()) {
+ if (prompt.content_keys.empty()) {
ids_beyond_what_is_known_unchecked: I8
-   check_ids(prompt.tokens.subspan(walk.matched), "tokens", walk.matched);
match_without_content: I8 key-dropped
- mapped[key.position] = contents_.find(mapped[key.position], key.content);
+ static_cast<void>(key);
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
match_does_not_see_what_left: I12
- match.missed = missed(match, length, reach);
+ match.missed = missed(match, length, {});
match_sees_what_left_without_content: I8 key-dropped
- symbols.subspan(match.length)
+ prompt.tokens.subspan(match.length)
what_left_is_not_missed: I12
- if (reach.left != nullptr) return history_.missed(reach);
never_made_at_the_end: I12 I3
- std::min(std::max(match.kv_length, reach.known), length - 1)
+ std::max(match.kv_length, reach.known)
never_made_as_far_as_the_tree_knows: I12
- std::max(match.kv_length, reach.known)
+ match.kv_length
never_made_as_far_as_history_knows: I12
- std::max(match.kv_length, reach.known)
+ reach.known
"""

CACHE = r"""
reserve_whole_prompt: I3
- const auto walk = this->walk(prompt, symbols(prompt, mapped), length - 1);
+ const auto walk = this->walk(prompt, symbols(prompt, mapped), length);
root_without_salt: I8 key-dropped
- tree_.make_root(salt)
+ tree_.make_root({})
lease_without_the_transcripts_content: I8 key-dropped
- if (prompt.transcript != nullptr && prompt.transcript->has_content) {
+ if (false) {
lease_without_content: I8 key-dropped
- token = contents_.acquire(token, key.content);
+ token = contents_.acquire(token, {});
fork_without_content: I8 leftovers
- if (child->has_content) contents_.acquire(rest);
cleared_though_something_stays: mirror
- if (options_.events && !salt && arena_.tree_pages() == 0 && tree_.checkpoints() == 0) journal_
+ if (options_.events && !salt) journal_
clear_crosses_salts: I8
- if (!salt || *root->salt == *salt) eviction_
+ eviction_
match_of_the_longer: I12 longer-index
- if (lease->course.start < match.length) {
+ if (false) {
refusal_keeps_pin: I6 leak-on-refusal
- tree_.let_go(at);
lone_request_refused: no-spare-slot
- if (node == nullptr || !leases_.empty()) return std::nullopt;
+ return std::nullopt;
gives_up_hit_beside_others: I6
- if (node == nullptr || !leases_.empty())
+ if (node == nullptr)
two_slots_a_request: reserved-slots
- make_room({1, pages - paging().whole(at->depth)
+ make_room({2, pages - paging().whole(at->depth)
pages_of_the_hit_needed_too: reserved-slots
- pages - paging().whole(at->depth)}
+ pages}
tail_not_copied: I11 I5
- lease.due_tail = {node->checkpoint->tail, lease.pages[paging().whole(start)]};
tail_copied_to_the_last_page: I11
- {node->checkpoint->tail, lease.pages[paging().whole(start)]}
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
fork_shares_the_live_slot: I5 donated-written
- resume(*child, source, pages);
+ resume(*child, source, pages);
+   arena_.free_slot(std::exchange(child->live, parent.live));
fork_without_read_pin: I5
- source = parent.read;
-     tree_.hold(source);
+ source = parent.read;
+     tree_.pin(source);
fork_of_one_slot: more-than-owned
- make_room({1 + publishes, pages - paging().whole(at)
+ make_room({1, pages - paging().whole(at)
refused_fork_keeps_pin: I6 leak-on-refusal
- if (!publishes) tree_.let_go(source);
fork_wants_nothing: first-branch
- if (wanted.position > at) child->course
+ if (false) child->course
fork_of_the_page_below: I2
- tree_.find(parent.anchor, parent.span(parent.anchor->depth, at))
+ parent.anchor
pin_does_not_pin_the_state: I5
- tree_.hold(walk.resume);
+ tree_.pin(walk.resume);
release_ignores_cap: cap
- counters_.pins.add(-1);
-   trim_to_cap();
+ counters_.pins.add(-1);
cap_ignored: cap
- if (options_.max_cached_bytes < 0) return;
+ return;
cap_counts_states_only: cap
- return arena_.tree_pages() * options_.page_bytes +
+ return
given_up_for_a_reserve: I12
- .cause = Cause::no_room
+ .cause = Cause::reserve
given_up_where_it_resumes: I12
- given_up{.position = match.length
+ given_up{.position = lease->course.start
counted_before_it_is_explained: I12
-   lease.match.missed = missed(lease.match, lease.course.prompt_length, reach);
-   lease.trail = history_.arrived(salt, reach, options.priority);
+   lease.trail = history_.arrived(salt, reach, options.priority);
+   lease.match.missed = missed(lease.match, lease.course.prompt_length, reach);
told_after_it_is_explained: I12
-   if (options.now >= 0) history_.tell(options.now);
-   Record* start = lease.read == nullptr ? nullptr : lease.read->checkpoint->record;
-   const auto reach = history_.reach(salt, start, lease.tokens);
-   lease.match.missed = missed(lease.match, lease.course.prompt_length, reach);
+   Record* start = lease.read == nullptr ? nullptr : lease.read->checkpoint->record;
+   const auto reach = history_.reach(salt, start, lease.tokens);
+   lease.match.missed = missed(lease.match, lease.course.prompt_length, reach);
+   if (options.now >= 0) history_.tell(options.now);
missed_to_the_end: I12
- .add(missed->position - lease->match.length);
+ .add(length - lease->match.length);
left_for_a_reserve_unsaid: I12
- Cause::reserve)) return at;
+ Cause::launch)) return at;
left_for_a_fork_unsaid: I12
- Cause::fork)) {
+ Cause::reserve)) {
left_for_the_cap_unsaid: I12
- Cause::cap
+ Cause::clear
left_by_clear_unsaid: I12
- Cause::clear
+ Cause::cap
"""

FILES = {"csrc/match.cpp": MATCH, "csrc/cache.cpp": CACHE}
