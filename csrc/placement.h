// Where checkpoints go: the boundaries that a prefill wants, where a step is cut for them, and which states are worth
// keeping at its end. It counts how often each kind was reused: what this traffic never uses soon costs no pass and
// evicts nothing. It owns those counters and nothing else.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "types.h"

namespace hybridcache {

struct Wanted {
  Position position;
  Kind kind;
  bool spare = false;  // made only where a slot is free: its kind has not shown its use lately
};

// Whether a slot could be had as things stand, for a boundary that may replace any checkpoint, and for one that may
// replace a superseded one only. No pass is paid for a state that there is no room to keep.
struct Room {
  bool for_any = true;
  bool for_superseded = true;
};

// What placement needs to know of a lease.
struct Course {
  Position prompt_length = 0;
  Position start = 0;
  Position boundary = 0;       // the last position restored or published
  bool branches = false;       // a first-time prompt, not the next turn of a conversation
  bool resend = false;         // all of the prompt was known
  Position left = 0;           // where it leaves all that is remembered, 0 if nothing went on from there
  Position again = 0;          // a boundary that was used before and is not there any more
  std::vector<Wanted> wanted;  // sorted by position, one kind each

  // Those in (from, to].
  std::span<const Wanted> wanted_in(Position from, Position to) const;
  // Adds a breakpoint, or makes one of what is wanted there.
  void want_breakpoint(Position position);
};

struct Cut {
  Position end = 0;           // of the step
  std::optional<Kind> kind;   // of the boundary at end, if there is to be one
  bool spare = false;         // that one only where a slot is free
  std::vector<Wanted> inner;  // boundaries strictly inside the step
  bool extra_pass = false;    // end was moved: one forward pass more
  std::vector<Kind> asked;    // kinds whose use was looked up; counted by taken()
};

class Placement {
 public:
  explicit Placement(const Options& options) : options_(options) {}

  // Fills course.wanted when a prompt has been matched.
  void want(Course& course, const Match& match, std::span<const Position> breakpoints);
  // Where a step [begin, end) really ends, and what stands there. `last` is the last boundary, or the one that an open
  // step is to leave. Changes nothing: a launch may still find no room.
  Cut cut(const Course& course, Position last, Position begin, Position end, const Room& room) const;
  void taken(const Cut& cut);

  void made(Kind kind);
  void used(Kind kind) { ++used_[index(kind)]; }

 private:
  static constexpr Position kCutGap = 8;        // a resend computes these; templates drop fewer tokens than that
  static constexpr std::int64_t kTrial = 16;    // made before a kind has to show its use; and one in so many after
  static constexpr std::int64_t kWorth = 8;     // one reuse pays for so many
  static constexpr std::int64_t kMemory = 256;  // made and used are halved there

  bool would_enable(Kind kind) const;
  bool enabled(Kind kind);
  Position effective(Position begin, Position end, Position wanted) const;
  std::vector<Wanted> inside(const Course& course, Position begin, Position end) const;
  void shorten(const Course& course, Cut& cut, Position begin, std::vector<Wanted> candidates, const Room& room) const;
  bool cut_before_end(const Course& course, Position begin, Position end) const;
  std::optional<Kind> free_boundary(const Course& course, Position last, Position begin, Position end) const;
  bool ask(Kind kind, Cut& cut) const;
  void add_interior(Course& course);

  const Options options_;
  std::int64_t made_[kKinds] = {}, used_[kKinds] = {}, asked_[kKinds] = {};
};

}  // namespace hybridcache
