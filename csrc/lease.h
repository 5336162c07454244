// One request's hold on the cache. It owns its live slot, the pages marked `owned`, and the pins on its path; it reads
// what the last boundary left (`read`) and writes only what it alone owns.
//
//   page table   [ tree's | tree's | own duplicate | tree's | own, partly filled ]      tree's pages lie on the path to
//   `anchor`, pinned tokens       0 ........ start .......... committed ..... computed ..... capacity
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "placement.h"
#include "tree.h"

namespace hybridcache {

// A step that was launched and not yet committed, with what it booked for the next plan.
struct OpenStep : Step {
  std::optional<Kind> kind;    // of the boundary wanted at its end
  std::int64_t plan = 0;       // the number of the plan that carries it
  bool from_boundary = false;  // the first step after one: its state is copied, or zeroed where there is none
  Copy tail{kNone, kNone};     // page copy due
  std::vector<PageId> zero_pages;
};

struct Lease {
  LeaseId id = 0;
  std::string salt;
  Match match;
  Course course;  // prompt_length, start, boundary, wanted
  Position committed = 0;
  Position computed = 0;
  std::vector<Token> tokens;  // from course.start on; prompt first
  bool has_content = false;

  std::vector<PageId> pages;      // the page table
  std::vector<bool> owned;        // which entries this lease owns
  std::vector<PageId> new_pages;  // taken, and not yet in a collected plan: they may be dirty
  std::int32_t home = kNone;      // slab of the last page taken
  SlotId live = kNone;
  bool fresh = true;            // the live slot's state must still come from `read`
  Node* anchor = nullptr;       // pinned
  Node* read = nullptr;         // whose checkpoint is pinned until the first commit after the boundary
  Copy due_tail{kNone, kNone};  // copy of the page that the boundary cuts

  std::optional<OpenStep> step;
  std::int64_t extra_passes = 0;
  bool resting = false;  // closed, but a pending plan can still touch what it holds

  Position capacity(Position page_size) const { return static_cast<Position>(pages.size()) * page_size; }
  // The tokens at positions [from, to). REQUIRES from >= course.start.
  std::span<const Token> span(Position from, Position to) const {
    return std::span(tokens).subspan(from - course.start, to - from);
  }
  // How many ids the commit of the open step has to bring.
  std::int64_t tokens_due() const {
    return step ? std::max<Position>(0, step->end - std::max(step->begin, course.prompt_length)) : 0;
  }
};

}  // namespace hybridcache
