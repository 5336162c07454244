"""The mutants of placement, of what all share, of the binding and of the pools. Data only, in the form of
mutants_list.py.
"""

from __future__ import annotations

PLACEMENT = r"""
wanted_at_begin_too: drafts
- const auto first = std::upper_bound(wanted.begin(), wanted.end(), from, before);
+ const auto first = std::upper_bound(wanted.begin(), wanted.end(), from - 1, before);
wanted_at_the_last_missed: drafts state-too-far
- std::upper_bound(first, wanted.end(), to, before)
+ std::upper_bound(first, wanted.end(), to - 1, before)
wanted_twice: drafts
- if (at == wanted.end() || at->position != position) at
+ at
wanted_kind_stays: drafts
-   *at = {position, Kind::breakpoint};
trial_without_end: learned
- kWorth * used_[k] >= made_[k]
+ true
never_asked_again: learned
- (asked_[k] + 1) % kTrial == 0
+ false
use_not_halved: learned
-   used_[k] /= 2;
made_not_halved: learned
-   made_[k] /= 2;
inner_asking_not_counted: learned
-   ++asked_[index(kind)];
-   return yes;
+   return yes;
breakpoints_ignored: first-branch
- if (position > course.start) wanted
+ if (false) wanted
no_fork_boundary: first-branch
- if (match.ways > 0 && match.kv_length
+ if (false && match.kv_length
fork_at_any_price: learned
- (match.kv_length - course.start) * match.ways >= cost) {
+ true) {
sharers_not_weighed: learned first-branch
- (match.kv_length - course.start) * match.ways >= cost) {
+ match.kv_length - course.start >= cost) {
no_inner_cut: identical-prompt
- if (course.branches && length - kCutGap > course.start)
+ if (false && length - kCutGap > course.start)
interior_in_even_steps: deep-fork
- at *= 2) {
+ at += options_.interior_spacing) {
last_kind_wins: learned
-   std::stable_sort(wanted.begin(), wanted.end(),
+   std::reverse(wanted.begin(), wanted.end());
+   std::stable_sort(wanted.begin(), wanted.end(),
alignment_ignored: chunk-grain
- (wanted - begin) / options_.alignment * options_.alignment
+ (wanted - begin)
end_is_aligned_too: chunk-grain
- if (wanted == end) return end;
one_boundary_twice: other-depth
- at > inside.back().position))
+ at >= inside.back().position))
no_cut_before_the_end: identical-prompt
- (course.resend || ask(Kind::cut, cut))) {
+ (course.resend || ask(Kind::cut, cut)) && false) {
resend_is_no_evidence: identical-prompt
- (course.resend || ask(Kind::cut, cut))) {
+ ask(Kind::cut, cut)) {
every_turn_is_cut: learned
- return (course.resend || course.branches) && begin == course.start
+ return begin == course.start
every_step_is_cut: learned
- begin == course.start && end == course.prompt_length &&
+ end == course.prompt_length &&
cut_at_any_price: learned
- saved >= std::max<Position>(options_.pass_cost, 1);
+ saved >= 1;
only_page_edges: chunk-grain
- return probably_last || sparse ?
+ return (probably_last || sparse) && end % options_.paging.page_size == 0 ?
no_sparse_boundaries: deep-fork
- return probably_last || sparse ?
+ return probably_last ?
no_last_chunk: chunk-grain identical-prompt
- return probably_last || sparse ?
+ return sparse ?
no_prompt_end: identical-prompt
- if (end == course.prompt_length) return Kind::prompt_end;
+ if (end == course.prompt_length) return std::nullopt;
boundary_at_every_token: learned
- if (end > course.prompt_length) return std::nullopt;
extra_pass_not_counted: learned
- cut.extra_pass = paid;
ask_in_vain: learned
- if (cut.kind) cut.spare = !ask(*cut.kind, cut);
+ if (cut.kind) ask(*cut.kind, cut);
"""

LEASE = r"""
tables_keep_what_they_held: I4
- table.clear();
large_tables_for_small_requests: leftovers
- pages.capacity() <= 4 * most_pages + 256 && tokens.capacity() <= 4 * most_tokens + 4096;
+ true;
tokens_of_the_prompt_due: I4
- std::max(steps.front().begin, course.prompt_length)
+ steps.front().begin
boundary_to_come_ignored: learned deep-fork
- return !steps.empty() && steps.back().kind ? steps.back().end : course.boundary;
+ return course.boundary;
"""

TYPES = r"""
lookahead_ignored: I5 drafts
- return (depth > lookahead ? depth - lookahead : 0) / page_size;
+ return depth / page_size;
lookahead_of_a_page: drafts
- pages == 0 ? 0 : pages * page_size + lookahead
+ pages == 0 ? 0 : pages * page_size
digest_of_events_only: I7
- state_ = (state_ ^ (event << 56) ^ value) *
+ state_ = (state_ ^ (event << 56)) *
"""

DOOR = r"""
broken_cache_serves: I6
- lock_.broken = true;
two_threads_inside: I6
- if (lock_.busy.test_and_set())
+ if (false)
operations_take_no_time: uncounted
- Times::Clock::now() - begin_
+ {}
"""

BIND = r"""
commits_count_as_launches: uncounted
- TimedDoor door(lock_, Operation::commit);
-     const Tokens view(tokens, "tokens");
-     const auto count
+ TimedDoor door(lock_, Operation::launch);
+     const Tokens view(tokens, "tokens");
+     const auto count
"""

TOKENS = r"""
negative_tokens: key-dropped
- if (checked_) check_ids(span_, name_);
wide_tokens_cut_off: key-dropped
- if (is_no_id(seen)) refuse_ids(wide, name_);
"""

PIECES = r"""
piece_goes_on_from_where_the_first_began: I2
- at, read = begin + position, slot
+ at = begin + position
inner_state_in_the_next_sequence: I2
- at = begin
+ at = 0
"""

GATED_DELTA = r"""
missing_state_not_zero: zero-state
- held[slots < 0] = 0
+ pass
missing_state_gathered: zero-state
- initial.masked_fill_((read_slots < 0)[:, None, None, None], 0)
+ initial.mul_((read_slots >= 0)[:, None, None, None])
padding_written: late-write
- there = slots >= 0
+ there = slots >= -1
first_candidate_read: wrong-bytes
- column = torch.zeros_like(reads[:, 0]) if chosen is None else chosen
+ column = torch.zeros_like(reads[:, 0])
decay_after_the_update: wrong-bytes
- (value - (held * key).sum(-2))
+ (value - (held / g[:, token].float().exp()[..., None, None] * key).sum(-2))
normalised_by_the_square: wrong-bytes
- keepdim=True) + 1e-6).sqrt() for each
+ keepdim=True) + 1e-6) for each
state_before_the_token: state-too-far
-         _scatter(state, writes[:, token], held)
+         _scatter(state, writes[:, token], held - key * change.unsqueeze(-2))
last_state_only: wrong-bytes
-         _scatter(state, writes[:, token], held)
+     _scatter(state, writes[:, token], held)
columns_one_early: state-too-far
- columns[..., token + 1 : token + _TAPS])
+ columns[..., token : token + _TAPS - 1])
one_side_counted: wrong-bytes
- self.scattered_bytes += initial.numel() * initial.element_size()
+ self.scattered_bytes += 0
"""

POOLS = r"""
slots_at_zero: I5 wrong-bytes
- at.slot_stride, at.slot_offset + offset)
+ at.slot_stride, offset)
parts_of_slots_overlap: wrong-bytes
- at.slot_stride, at.slot_offset + offset)
+ at.slot_stride, at.slot_offset)
slots_packed: I5 wrong-bytes
- at.slot_stride, at.slot_offset + offset)
+ at.slot_bytes, at.slot_offset + offset)
parts_of_pages_overlap: wrong-bytes
- at.page_bytes, offset)
+ at.page_bytes, 0)
half_a_slot_copied: I2 wrong-bytes
- layout.slot_bytes // _WORD.itemsize
+ layout.slot_bytes // _WORD.itemsize // 2
slot_padding_copied: I5 wrong-bytes
- layout.slot_bytes // _WORD.itemsize
+ geometry.slot_stride // _WORD.itemsize
heads_transposed: wrong-bytes
- strides[axis + 1] * shape[axis + 1]
+ strides[axis + 1] * shape[axis]
offset_counted_twice: wrong-bytes
- + offset // dtype.itemsize)
+ + offset)
views_of_inference: wrong-bytes
- with torch.inference_mode(False):
+ with torch.inference_mode(True):
parts_in_memory_order: wrong-bytes
- for spec in layer.parts)
+ for spec in reversed(layer.parts))
extra_state_of_the_front: wrong-bytes
- slot_views[len(slot_views) - len(layout.extra_state) :]
+ slot_views[: len(layout.extra_state)]
copies_in_indirect_mode: I5 late-write
- if self.copies == "eager":
+ if True:
no_slot_copies: I2 zero-state
- if self.copies == "eager":
+ if False:
no_page_copies: I11 wrong-bytes
- moves = [self._pages.check(plan.copy_pages, plan.zero_pages)]
+ self._pages.check(plan.copy_pages, plan.zero_pages)
+         moves = []
no_page_zeroes: not-zeroed
- self._pages.check(plan.copy_pages, plan.zero_pages)
+ self._pages.check(plan.copy_pages, plan.zero_pages[:0])
slots_checked_too_late: I6
-         slots = self._slots.check(plan.copy_slots, plan.zero_slots)
+         for move in moves:
+             move.one_by_one()
+         slots = self._slots.check(plan.copy_slots, plan.zero_slots)
captured_room_ignored: more-than-owned
- if move.size > bound:
+ if False:
captured_plan_lost: wrong-bytes
-         self._moves = moves
+         self._moves = self._moves
buffer_too_small: more-than-owned
- if buffer.numel() < total_bytes:
+ if False:
buffer_not_aligned: wrong-bytes
- if buffer.data_ptr() % ALIGNMENT or buffer.storage_offset() % ALIGNMENT:
+ if False:
arena_too_short: more-than-owned
- if geometry.total_bytes < extent:
+ if False:
"""

MOVES = r"""
row_not_zeroed: not-zeroed
-             words[zeroed].zero_()
+             pass
rows_not_zeroed: not-zeroed
-             words.index_fill_(0, zeroes, 0)
+             pass
row_copied_backwards: I5 wrong-bytes
- words[target].copy_(words[source])
+ words[source].copy_(words[target])
first_round_only: wrong-bytes
- range(0, len(targets), count)
+ range(0, min(count, len(targets)), count)
last_id_beyond: more-than-owned
- (ids >= count)
+ (ids > count)
negative_ids: more-than-owned
- (ids < 0) | (ids >= count)
+ (ids >= count)
sources_unchecked: more-than-owned
- for ids in (sources, written):
+ for ids in (written,):
few_ids_negative: more-than-owned
- return alone and min(every) >= 0 and
+ return alone and
few_ids_beyond: more-than-owned
- max(every) < len(self._rank)
+ max(every) <= len(self._rank)
few_sources_unchecked: more-than-owned
-         every += read
few_destinations_twice: wrong-bytes
- alone = len(written) == len(every) and
+ alone =
few_sources_are_destinations: wrong-bytes
- and written.isdisjoint(read)
many_never_checked: more-than-owned
- if len(targets) + len(zeroes) > _FEW:
-             return False
+ if len(targets) + len(zeroes) > _FEW:
+             return True
destination_twice: wrong-bytes
- self._rank[written] != order,
+ written != written,
source_is_destination: wrong-bytes
- written[rank] == sources,
+ sources != sources,
"""

FILES = {
    "csrc/placement.cpp": PLACEMENT,
    "csrc/lease.h": LEASE,
    "csrc/types.h": TYPES,
    "csrc/door.h": DOOR,
    "csrc/bind.cpp": BIND,
    "csrc/tokens.h": TOKENS,
    "hybridcache/_pieces.py": PIECES,
    "hybridcache/gated_delta.py": GATED_DELTA,
    "hybridcache/pools.py": POOLS,
    "hybridcache/_moves.py": MOVES,
}
