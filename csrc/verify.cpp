// Steps whose tokens may not all stay: speculative decoding, and the breakpoints that an engine sees only in the
// tokens.
//
//   tokens    certain | draft | draft | draft       a verify step leaves the live slot alone and writes rows, slots of
//   rows        r0       r1      r2      r3         its own; the commit says how many tokens stay: an index moves
//                         ^ two stay: r1 is the live slot now, the others are freed
//
// A boundary inside the accepted run is published from its own row, whatever was accepted beyond it. What was not
// accepted is nowhere: its KV lies beyond `committed`, where the next step writes.
#include <algorithm>
#include <utility>

#include "cache.h"

namespace hybridcache {

// ---------------------------------------------------------------- launch

std::int64_t Cache::rows_of(const Lease& lease, Position count, std::int64_t asked) const {
  if (asked != kDefaultRows) return asked;
  const bool may_draft =
      lease.computed >= lease.course.prompt_length && count >= 2 && count <= options_.draft_tokens + 1;
  return may_draft || lease.behind_verify_step() ? count : 0;
}

void Cache::check_rows(const Lease& lease, Position count, std::int64_t rows) const {
  const auto refuse = [&](const std::string& expected) {
    throw std::invalid_argument("rows: " + text(rows) + " for a step of " + text(count) + " tokens of lease " +
                                text(lease.id) + ", expected " + expected);
  };
  const auto most = options_.draft_tokens == 0 ? 0 : options_.draft_tokens + 1;
  if (rows < 0 || rows > std::min(count, most)) refuse("0 to " + text(std::min(count, most)));
  if (rows > 0 && lease.computed < lease.course.prompt_length) refuse("0 inside the prompt");
  if (!lease.behind_verify_step()) return;
  const OpenStep& before = lease.steps.back();
  if (before.is_void)
    throw StateError("launch: lease " + text(lease.id) + " has a step that reads what did not stay, expected that " +
                     "it is committed first, without tokens");
  if (rows == 0) refuse("more: the step before is not committed, and where this one begins its rows say");
  if (before.rows.size() > 1 && rows != count) refuse(text(count) + ": where it begins is not known");
}

std::optional<Step> Cache::launch_verify(Lease& lease, Position count, std::int64_t rows) {
  OpenStep step;
  step.begin = step.begin_max = lease.computed;
  const bool behind = lease.behind_verify_step();
  if (behind) {
    step.candidates = lease.steps.back().rows;
    step.begin -= static_cast<Position>(step.candidates.size()) - 1;
  }
  const bool known = step.begin == step.begin_max;
  const auto uncovered = lease.course.wanted_in(step.begin, step.begin + count - rows);
  if (known && !uncovered.empty()) {
    count = uncovered.front().position - step.begin;
    rows = std::min(rows, count);
  }
  step.end = step.begin + count;
  const auto pages = std::max(paging().spanned(step.begin_max + count), static_cast<Position>(lease.pages.size()));
  const auto missing = pages - static_cast<Position>(lease.pages.size());
  if (!admission_.make_room({rows, missing}, Cause::launch)) return std::nullopt;
  while (static_cast<std::int64_t>(step.rows.size()) < rows) step.rows.push_back(arena_.take_slot());
  take_pages(lease, pages);
  step.read_slot = behind ? step.candidates.front() : source(lease);
  step.write_slot = step.rows.back();
  step.moves_state = known && rows == 1;
  return open_step(lease, std::move(step));
}

// ---------------------------------------------------------------- commit

// How many tokens may be committed for the oldest step.
void Cache::check_count(const Lease& lease, std::int64_t count) const {
  const OpenStep& step = lease.steps.front();
  const auto refuse = [&](const std::string& expected, const char* why) {
    throw std::invalid_argument("tokens: " + text(count) + " given, expected " + expected + " for lease " +
                                text(lease.id) + ": " + why);
  };
  if (!step.verifies()) {
    if (count != lease.tokens_due()) refuse(text(lease.tokens_due()), "those that its step read beyond the prompt");
    return;
  }
  const auto length = step.end - step.begin;
  const auto least = length - static_cast<Position>(step.rows.size()) + 1;
  if (step.is_void && count != 0) refuse("0", "nothing stayed of the step before");
  if (count != 0 && (count < least || count > length))
    refuse("0, or " + text(least) + " to " + text(length), "those that stay");
}

void Cache::commit_verify(Lease& lease, OpenStep step, std::span<const Token> tokens) {
  const auto stay = static_cast<Position>(tokens.size());
  if (stay > 0) {
    lease.tokens.insert(lease.tokens.end(), tokens.begin(), tokens.end());
    lease.committed = step.begin + stay;
    release_read(lease);
    const auto publication = rows_to_publish(lease, step);
    publish(lease, publication);
  }
  give_up_rows(lease, step, stay == 0);
  if (lease.steps.empty()) {
    lease.computed = lease.committed;
  } else if (stay > 0) {  // where the next step begins is known now
    OpenStep& next = lease.steps.front();
    next.end += lease.committed - next.begin;
    next.begin = next.begin_max = lease.committed;
    lease.computed = next.end;
  }
}

// Frees the rows that are left. If nothing stays, a step that was launched behind has read what nobody wants; its plan
// may name the rows, and one that is not collected yet may run on a row that the device took to stay: it keeps them.
void Cache::give_up_rows(Lease& lease, OpenStep& step, bool nothing_stays) {
  for (const SlotId row : step.kept) arena_.free_slot(row);
  std::erase(step.rows, kNone);
  OpenStep* next = lease.steps.empty() ? nullptr : &lease.steps.front();
  if (next != nullptr && (nothing_stays || next->plan == next_plan_)) {
    next->kept = std::move(step.rows);
    next->is_void |= nothing_stays;
    return;
  }
  for (const SlotId row : step.rows) arena_.free_slot(row);
}

// Takes out of step.rows what becomes a checkpoint, and the row of `committed`, whose state the lease goes on from. No
// slot has to be found: if that one is published the live slot, whose state nobody needs any more, is the next one.
Cache::Publication Cache::rows_to_publish(Lease& lease, OpenStep& step) {
  const auto first = step.end - static_cast<Position>(step.rows.size()) + 1;
  const auto take_row = [&](Position at) { return std::exchange(step.rows.at(at - first), kNone); };
  Publication publication;
  for (const auto& wanted : lease.course.wanted_in(step.begin, lease.committed)) {
    if (known_checkpoint(lease, wanted.position)) {
      counters_.duplicate_checkpoints.add();
    } else if (wanted.position < lease.committed) {
      publication.inner.push_back({wanted.position, take_row(wanted.position), wanted.kind});
    } else {
      publication.kind = wanted.kind;
      publication.state = take_row(wanted.position);
      publication.next = lease.live;
    }
  }
  if (!publication.kind) {
    arena_.free_slot(std::exchange(lease.live, take_row(lease.committed)));
    lease.fresh = false;
  }
  return publication;
}

// ---------------------------------------------------------------- want

void Cache::want(LeaseId id, Position position) {
  Lease& lease = open_lease(id);
  const bool at_open_end = position == lease.computed && !lease.steps.empty() && !lease.behind_verify_step();
  bool has_row = false;
  if (!lease.steps.empty() && lease.steps.front().verifies() && !lease.steps.front().is_void) {
    const OpenStep& oldest = lease.steps.front();
    has_row = position > oldest.end - static_cast<Position>(oldest.rows.size()) && position <= oldest.end;
  }
  if (position <= lease.computed && !at_open_end && !has_row) {
    throw std::invalid_argument("position: " + text(position) + ", expected one beyond " + text(lease.computed) +
                                ", which lease " + text(id) + " has computed, or one that a row of its step covers");
  }
  if (at_open_end) {
    lease.steps.back().kind = Kind::breakpoint;
    lease.steps.back().spare = false;
  } else {
    lease.course.want_breakpoint(position);
  }
  digest_.mix(kWant, static_cast<std::uint64_t>(position) << 20 ^ id);
}

}  // namespace hybridcache
