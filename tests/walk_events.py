"""What a walk (actions.py) has to have seen, several times each, to be worth its time: names of rare moments.

They are counted in Harness.events, SymbolicMemory.events and the oracle's; Harness.total_events adds them up.
"""

from tests.oracle_view import CAUSES

WALK_EVENTS = (
    "hit",
    "evicted",
    "no_room",
    "no_room_at_launch",
    "no_room_at_fork",
    "retried",
    "fork_published",
    "tails_copied",
    "slot_to_page",
    "page_to_slot",
    "rested",
    "superseded",
    "inner",
    "dropped_checkpoints",
    "extra_passes",
    "spare_dropped",
    "closed_launched",
    "closed_collected",
    "closed_applied",
    "closed_ran",
    "cleared",
    "pinned",
    "too_large",
    "closed_before_copy",
    "forked_before_copy",
    "closed_in_shared_tail",
    "forked_in_shared_tail",
    "tail_filled_by_its_writer",
    "tail_evicted_while_held",
    "launched_ahead",
    "gone_on",
    "boundary_dropped_ahead",
    "left_behind",
    "taken_back",
    "committed_behind",
    "two_pending",
    "rest_ended_by_plan",
    "rest_ended_idle",
    "closed_two_open",
    "ghosts",
    "verify_steps",
    "accepted_some",
    "void",
    "row_published",
    "row_at_end_published",
    "row_duplicate",
    "verify_ahead",
    "verify_behind_ordinary",
    "range_begin",
    "void_behind",
    "void_never_ran",
    "fails",
    "single_row",
    "single_row_kept",
    "fewer_rows_than_tokens",
    "shortened_for_want",
    "no_room_for_rows",
    "verify_grew",
    "verify_copied_tail",
    "gone_on_before_verify",
    "dropped_before_verify",
    "left_behind_before_verify",
    "wanted_in_row",
    "wanted_ahead",
    "wanted_again",
    "wanted_at_open_end",
    "want_refused",
    "launch_refused",
    "commit_refused",
    "batch_refused",
    "stopped_short",
    "closed_verify",
    "ghosts_verify",
    "full_tail",
    "lookahead_provisional",
    "lookahead_rejected",
)

# What a walk with transcripts (transcript_actions.py) has to have seen besides. "after": something happened
# to the nodes that the transcript was seen to match, and then it was asked for again.
TRANSCRIPT_EVENTS = (
    "transcripts",
    "transcript_hit",
    "transcript_hit_with_content",
    "transcript_told",
    "transcript_empty_refused",
    "transcript_cut_under_its_lease",
    "transcript_closed_before_its_lease",
    "transcripts_moved_together",
    *(
        f"transcript_{how}_after_{what}"
        for how in ("match", "reserve")
        for what in ("eviction", "merge", "merge_above", "split", "truncation", "clear")
    ),
)

# What matches have missed, by cause (docs/design.md, section 3), in probes, matches and reserves.
MISSED_EVENTS = tuple(f"missed_{cause}" for cause in CAUSES)
