"""Small cases of the oracle with `lookahead=1`, worked out by hand from docs/design.md, Whole pages.

In the arenas here a slab is one page or one slot, so ids count up.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.oracle_store import Arena, Store
from tests.test_oracle import advance, commit, conversation, harness, opened, prefill
from tests.test_oracle_verify import PROMPT, decoding, draft, keep


def test_a_page_is_whole_one_token_later() -> None:
    store = Store(Arena(True, 1, 9, 9), 4, False, lookahead=1)
    assert [store.whole(d) for d in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
    assert [store.whole_at(n) for n in (0, 1, 2)] == [0, 5, 9]
    assert [len(path) for _, path in store.page_keys((b"", tuple(range(12))))] == [5, 9]


def test_a_checkpoint_at_a_page_edge_has_a_full_tail_which_who_resumes_copies() -> None:
    h = harness(page_size=4, per_slab=1, lookahead=1)
    conversation(h, [1, 2, 3, 4])
    checkpoint = h.oracle.store.checkpoints[b"", (1, 2, 3, 4)]
    assert (checkpoint.slot, checkpoint.tail) == (0, 1) and not h.oracle.store.pages
    flight = opened(h, [1, 2, 3, 4, 5, 6, 7, 8])
    assert flight.oracle.start == 4 and flight.oracle.pages == [3, 4], "ceil(8 / 4) - whole(4) pages"
    h.launch(flight, 4, ())
    h.plan()
    assert h.pending[0][0].copy_pages == [(1, 3)] and h.pending[0][0].zero_pages == [4]
    h.apply()
    h.run(flight)
    commit(h, flight)
    assert h.oracle.store.pages == {(b"", (1, 2, 3, 4, 5)): 3}, "whole(8) == 1"
    assert h.oracle.store.checkpoints[b"", tuple(range(1, 9))].tail == 4
    assert h.memory.events["lookahead_provisional"] == 1, "the entry of position 3"


def test_the_anchor_stands_where_the_last_whole_page_became_whole() -> None:
    h = harness(page_size=4, per_slab=1, lookahead=1)
    flight = opened(h, [1, 2, 3], max_new=9)
    prefill(h, flight)
    anchored = []
    for token in range(7):
        advance(h, flight, 1, (token,))
        anchored.append((flight.oracle.committed, flight.oracle.anchored))
    assert anchored == [(4, 3), (5, 5), (6, 5), (7, 5), (8, 5), (9, 9), (10, 9)]


@pytest.mark.parametrize(
    ("lookahead", "ends"),
    [
        (0, {(1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 9, 9)}),
        (1, {(1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 4, 9)}),
    ],
)
def test_paths_share_a_page_only_if_they_share_all_that_it_depends_on(lookahead: int, ends: Any) -> None:
    h = harness(page_size=2, per_slab=1, lookahead=lookahead)
    conversation(h, [1, 2, 3, 4, 5, 6])
    conversation(h, [1, 2, 3, 4, 9, 9])
    assert {path for _, path in h.oracle.store.pages} == ends


def test_an_accepted_row_leaves_no_draft_entry_of_a_rejected_token() -> None:
    h, flight = decoding(lookahead=1, breakpoints=(8,))
    draft(h, flight, 4, stay=3)
    keep(h, flight, 3)
    assert h.oracle.store.checkpoints[b"", (*PROMPT, 6, 7, 8)].tail == flight.oracle.pages[1]
    advance(h, flight, 1, (99,))
    assert h.memory.events["lookahead_rejected"] == 1, "the entry of position 7 knew token 9"
    assert h.oracle.store.pages[b"", (*PROMPT, 6, 7, 8, 99)] == flight.oracle.pages[1]
