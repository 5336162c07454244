"""The oracle's verify steps: launches with rows, commits with counts, want (docs/design.md section 4).

A part of Oracle (oracle.py): decides for each launch and commit whether its step is an ordinary one
(oracle_steps.py) or a verify step. It raises ValueError, before anything changes, for rows, counts and
positions that the design forbids. Where a step begins counts as known if `begin == begin_max`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.oracle_placement import BREAKPOINT
from tests.oracle_steps import OrdinarySteps
from tests.oracle_types import Lease, OpenStep, Step, Wanted


class VerifySteps(OrdinarySteps):
    draft_tokens: int

    # ---- launch

    def launch(self, lease: Lease, n: int, rows: int | None = None) -> Step | None:
        assert self.may_launch(lease) and n > 0
        rows = self.rows_of(lease, n, rows)
        return self._launch_verify(lease, n, rows) if rows else self._launch_ordinary(lease, n)

    def rows_of(self, lease: Lease, n: int, rows: int | None) -> int:
        """How many rows the step takes: 0 for an ordinary one."""
        before = lease.open[-1].rows if lease.open else 0
        decodes = lease.computed >= lease.prompt_length
        if rows is None:
            rows = n if (decodes and 2 <= n <= self.draft_tokens + 1) or before else 0
        impossible = rows < 0 or rows > min(n, self.draft_tokens + 1)
        too_early = rows > 0 and (self.draft_tokens == 0 or not decodes)
        leaves_none = bool(before) and rows == 0
        unknown_uncovered = before > 1 and rows != n
        if impossible or too_early or leaves_none or unknown_uncovered:
            raise ValueError("rows")
        return rows

    def pages_for(self, lease: Lease, n: int, rows: int) -> int:
        """The page table's length for a step of `n` tokens."""
        end = self._begins(lease)[1] + n
        if not rows and lease.computed < lease.prompt_length:
            end = min(end, lease.prompt_length)
        return self._pages_up_to(lease, end)

    def refuses(self, lease: Lease, n: int, rows: int | None) -> bool:
        """Whether a launch would be a mistake."""
        try:
            found = self.rows_of(lease, n, rows)
        except ValueError:
            return True
        return not self.arena.could_ever_hold(1, self.pages_for(lease, n, found))

    def _begins(self, lease: Lease) -> tuple[int, int]:
        """The lowest and the highest position at which the next step may begin."""
        before = lease.open[-1] if lease.open else None
        end = before.step.end if before else lease.computed
        return (end - before.rows + 1 if before and before.rows else end), end

    def _launch_verify(self, lease: Lease, n: int, r: int) -> Step | None:
        if not self.arena.could_ever_hold(1, self.pages_for(lease, n, r)):
            raise ValueError("n")
        before = lease.open[-1] if lease.open else None
        behind_verify = before is not None and before.rows > 0
        begin, begin_max = self._begins(lease)
        known = begin == begin_max
        uncovered = [w.position for w in lease.wanted if known and begin < w.position <= begin + n - r]
        if uncovered:
            n, r = uncovered[0] - begin, min(r, uncovered[0] - begin)
        total_pages = self.pages_for(lease, n, r)
        if not self.store.make_room(r, total_pages - len(lease.pages), "launch"):
            self.counters["refused_launches"] += 1
            self.events["no_room_for_rows"] += 1
            return None
        self.counters["launches"] += 1
        rows = [self.arena.take_slot() for _ in range(r)]
        self.events["verify_grew"] += total_pages > len(lease.pages)
        self._grow(lease, total_pages)
        reads = before.step.write_slots if before and behind_verify else [self._read_slot(lease)]
        if before is not None and before.kind is not None:
            self._go_on(lease, before)
            self.events["gone_on_before_verify"] += before.gone_on
            self.events["dropped_before_verify"] += not before.gone_on
        step = Step(begin, begin + n, reads[0], rows[-1], [], begin_max, list(reads), rows)
        state = (reads[0], rows[0]) if r == 1 and known else None
        self._note(lease, step, behind_verify, bool(uncovered))
        self._opened(lease, OpenStep(step, None, False, [], self._book(lease, state), rows=r), begin_max + n)
        return step

    def _note(self, lease: Lease, step: Step, behind_verify: bool, shortened: bool) -> None:
        self.events["verify_steps"] += 1
        self.events["verify_ahead"] += behind_verify
        self.events["verify_behind_ordinary"] += bool(lease.open) and not behind_verify
        self.events["range_begin"] += step.begin < step.begin_max
        self.events["single_row"] += len(step.write_slots) == 1 < step.end - step.begin
        self.events["fewer_rows_than_tokens"] += 1 < len(step.write_slots) < step.end - step.begin
        self.events["shortened_for_want"] += shortened
        self.events["verify_copied_tail"] += lease.copy_from is not None

    # ---- commit

    def commit(self, lease: Lease, tokens: Sequence[int] = ()) -> None:
        opened = lease.open[0]
        assert opened.number is not None and opened.number <= self.done
        if opened.rows:
            self._commit_verify(lease, opened, tokens)
        else:
            self._commit_ordinary(lease, opened, tokens)

    def may_keep(self, opened: OpenStep, m: int) -> bool:
        n = opened.step.end - opened.step.begin
        return m == 0 or (not opened.void and n - opened.rows < m <= n)

    def _commit_verify(self, lease: Lease, opened: OpenStep, tokens: Sequence[int]) -> None:
        if not self.may_keep(opened, len(tokens)):
            raise ValueError("tokens")
        lease.open.pop(0)
        if tokens:
            self._keep(lease, opened, tokens)
        else:
            self._keep_none(lease, opened)
        self._end_rests()

    def _keep_none(self, lease: Lease, opened: OpenStep) -> None:
        self.counters["commits"] += 1
        self.events["void"] += 1
        self._give_up(lease, opened, list(opened.step.write_slots))
        if lease.open:  # it has read what nobody wants
            lease.open[0].void = True
            self.events["void_behind"] += 1
        else:
            lease.computed = lease.committed

    def _give_up(self, lease: Lease, opened: OpenStep, rows: list[int]) -> None:
        """Frees rows, but for those that the step behind may still read."""
        if lease.open and (not opened.read_up_to or lease.open[0].number is None):
            lease.open[0].passed_on = rows
            self.events["rows_passed_on"] += len(rows)
            rows = []
        for slot in [*opened.passed_on, *rows]:
            self.arena.free_slot(slot)

    def _keep(self, lease: Lease, opened: OpenStep, tokens: Sequence[int]) -> None:
        step, m = opened.step, len(tokens)
        c = step.begin + m
        self._read_up_to(lease, opened, c, tokens)
        row = dict(zip(range(step.end - opened.rows + 1, step.end + 1), step.write_slots, strict=True))
        wanted = [w for w in lease.wanted if step.begin < w.position <= c]
        new = [w for w in wanted if lease.key(w.position) not in self.store.checkpoints]
        places = [(w.position, w.kind, row.pop(w.position)) for w in new]
        self._publish_all(lease, places)
        if c in row:  # not published: its row is the live slot
            self.arena.free_slot(lease.live_slot)
            lease.live_slot = row.pop(c)
        lease.fresh = bool(places) and places[-1][0] == c
        opened.read_up_to = c
        self._give_up(lease, opened, list(row.values()))
        self.events["accepted_some"] += m < step.end - step.begin
        self.events["single_row_kept"] += opened.rows == 1 < m
        self.events["row_duplicate"] += len(wanted) - len(new)
        self.events["row_at_end_published"] += lease.fresh
        self.events["row_published"] += len(new) - lease.fresh
        self._behind(lease, c)

    def _behind(self, lease: Lease, c: int) -> None:
        """`c` tokens are committed: a verify step that is open behind begins there."""
        lease.computed = c
        if lease.open:
            behind = lease.open[0]
            lease.computed = c + behind.step.end - behind.step.begin
            behind.step = behind.step._replace(begin=c, begin_max=c, end=lease.computed)

    # ---- want

    def want(self, lease: Lease, position: int) -> None:
        last = lease.open[-1] if lease.open else None
        covered = bool(lease.open) and self._covers(lease.open[0], position)
        if position > lease.computed or covered:
            others = [w for w in lease.wanted if w.position != position]
            self.events["wanted_again"] += len(others) < len(lease.wanted)
            lease.wanted = sorted([*others, Wanted(position, BREAKPOINT)])
            self.events["wanted_in_row" if covered else "wanted_ahead"] += 1
        elif last is not None and not last.rows and position == lease.computed:
            last.kind, last.spare = BREAKPOINT, False
            self.events["wanted_at_open_end"] += 1
        else:
            raise ValueError("position")

    def _covers(self, opened: OpenStep, position: int) -> bool:
        """Whether a row will hold the state at `position`: of a void step none does, wherever it began."""
        step = opened.step
        known = step.begin == step.begin_max and not opened.void
        return known and opened.rows > 0 and step.end - opened.rows < position <= step.end
