// One request's hold on the cache. It holds its live slot, the pages marked `owned`, and the pins on its path; it reads
// what the last boundary left and writes only what it alone owns: its live slot, and positions from `committed` on.
//
//   page table   [ tree's | tree's | own duplicate | tree's | own, partly filled ]
//   tokens       0 ....... start ............... committed ....... computed ....... capacity
//
// The tree's pages lie on the path to `anchor`, which is pinned. The partly filled page may be a tail of the tree, too.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "history.h"
#include "page_table.h"
#include "placement.h"
#include "tree.h"

namespace hybridcache {

// A step that was launched and not yet committed, with what it booked for the next plan.
struct OpenStep : Step {
  std::optional<Kind> kind;  // of the boundary that is to stand at its end
  bool spare = false;        // that one only where a slot is free
  bool gone_on = false;      // the next step was launched from that boundary, on a live slot of its own
  std::int64_t plan = 0;     // the number of the plan that carries it
  bool moves_state = true;   // the plan brings the state from read_slot to write_slot
  bool is_void = false;      // behind a verify step of which nothing stayed: nothing of this one may stay either
  std::vector<SlotId> kept;  // rows of the verify step before, which this one may still read; freed with it
  Copy tail{kNone, kNone};   // page copy due
  std::vector<PageId> zero_pages;
};

struct Lease {
  LeaseId id = 0;
  Match match;
  Course course;  // prompt_length, start, boundary, wanted
  Trail trail;    // its place in the history of boundaries, if one is kept
  Position committed = 0;
  Position computed = 0;
  std::vector<Token> tokens;  // from course.start on; prompt first
  bool has_content = false;

  PageTable pages;                // from position 0 on
  std::vector<bool> owned;        // which entries this lease owns
  std::vector<PageId> new_pages;  // taken, and not yet in a collected plan: they may be dirty
  std::int32_t home = kNone;      // slab of the last page taken
  SlotId live = kNone;
  bool fresh = true;            // the live slot's state must still come from `read`
  Node* anchor = nullptr;       // pinned
  Node* read = nullptr;         // whose checkpoint is pinned until the first commit after the boundary
  Copy due_tail{kNone, kNone};  // after a restore: copy of the page that the boundary cuts
  SlotId left_behind = kNone;   // a duplicate state that the next step reads; freed at the next commit

  std::vector<OpenStep> steps;  // launched and not committed, oldest first: two at most
  std::int64_t extra_passes = 0;
  std::int64_t batch = 0;    // the last one that it was in
  std::uint64_t made = 0;    // tick of the checkpoint that it left at course.boundary, 0 if it left none
  bool retires = false;      // closed with keep="nothing": that checkpoint will not be asked for
  std::int64_t resting = 0;  // closed, but a step that the plan of this number carried may still run; 0: not closed

  // Whether its tables are no more than some times too large.
  bool fits(std::size_t most_pages, std::size_t most_tokens) const {
    return pages.capacity() <= 4 * most_pages + 256 && tokens.capacity() <= 4 * most_tokens + 4096;
  }
  // As a new one, but for the memory of its tables, which stays. (That of its pages somebody may still look at.)
  void clear() {
    Lease anew;
    const auto keep = [](auto& memory, auto& table) {
      table.clear();
      std::swap(memory, table);
    };
    keep(anew.tokens, tokens);
    keep(anew.owned, owned);
    keep(anew.new_pages, new_pages);
    keep(anew.steps, steps);
    std::swap(anew.pages, pages);
    *this = std::move(anew);
  }
  Position capacity(Position page_size) const { return static_cast<Position>(pages.size()) * page_size; }
  bool behind_verify_step() const { return !steps.empty() && steps.back().verifies(); }
  // The tokens at positions [from, to). REQUIRES from >= course.start.
  std::span<const Token> span(Position from, Position to) const {
    return std::span(tokens).subspan(from - course.start, to - from);
  }
  // The last boundary, or the one that the last open step is to leave.
  Position last_boundary() const { return !steps.empty() && steps.back().kind ? steps.back().end : course.boundary; }
  // How many ids the commit of the oldest open step, an ordinary one, has to bring.
  std::int64_t tokens_due() const {
    if (steps.empty()) return 0;
    return std::max<Position>(0, steps.front().end - std::max(steps.front().begin, course.prompt_length));
  }
};

}  // namespace hybridcache
