// The words that every file of the core shares: ids, kinds, options, and the plain values that cross the door (Match,
// Step, Plan). Nothing here owns memory of the cache or changes it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace hybridcache {

using Token = std::int32_t;  // >= 0; negative values stand for (token, content) pairs, see tree.h
using PageId = std::int32_t;
using SlotId = std::int32_t;
using Position = std::int64_t;
using LeaseId = std::int64_t;
using PinId = std::int64_t;
constexpr std::int32_t kNone = -1;

// Why a checkpoint was made. The order is the one in which counters are printed.
enum class Kind : std::uint8_t { turn_end, prompt_end, chunk_end, breakpoint, fork, cut, interior };
constexpr int kKinds = 7;
constexpr const char* kKindNames[kKinds] = {"turn_end", "prompt_end", "chunk_end", "breakpoint",
                                            "fork",     "cut",        "interior"};
constexpr int index(Kind kind) {
  return static_cast<int>(kind);
}
// What a caller asked for, or a second prompt has shown to be shared, may replace any checkpoint; the others only a
// superseded one.
constexpr bool replaces_any(Kind kind) {
  return kind == Kind::breakpoint || kind == Kind::fork;
}
constexpr const char* name(Kind kind) {
  return kKindNames[index(kind)];
}

// Why a match ended where it did (I12).
enum class Reason : std::uint8_t { cold, complete, remainder, unknown, no_checkpoint, no_room };
constexpr int kReasons = 6;
constexpr const char* kReasonNames[kReasons] = {"cold", "complete", "remainder", "unknown", "no_checkpoint", "no_room"};
constexpr int index(Reason reason) {
  return static_cast<int>(reason);
}
constexpr const char* name(Reason reason) {
  return kReasonNames[index(reason)];
}

// How a boundary that would have helped came to be missed: what its checkpoint left for, that none was made there, or
// that the reserve itself gave it up. The order is the one in which counters are printed.
enum class Cause : std::uint8_t { never_made, reserve, launch, fork, checkpoint, cap, clear, taken_back, no_room };
constexpr int kCauses = 9;
constexpr const char* kCauseNames[kCauses] = {"never_made", "reserve", "launch",     "fork",   "checkpoint",
                                              "cap",        "clear",   "taken_back", "no_room"};
constexpr int index(Cause cause) {
  return static_cast<int>(cause);
}
constexpr const char* name(Cause cause) {
  return kCauseNames[index(cause)];
}

inline Position ceil_div(Position a, Position b) {
  return (a + b - 1) / b;
}

// How positions fall into pages. A page is whole at the depth at which all that it depends on is known: with
// lookahead = 1 the last entry of a draft layer's KV depends on the token after it, and its page is whole one token
// later.
struct Paging {
  std::int64_t page_size = 64;  // tokens a page
  std::int64_t lookahead = 0;   // 0 or 1

  // How many pages are whole at `depth`.
  Position whole(Position depth) const { return (depth > lookahead ? depth - lookahead : 0) / page_size; }
  // Where page number `pages - 1` becomes whole; 0 for none.
  Position whole_at(Position pages) const { return pages == 0 ? 0 : pages * page_size + lookahead; }
  // How many pages the first `length` positions lie in.
  Position spanned(Position length) const { return ceil_div(length, page_size); }
};

enum class Policy : std::uint8_t { learned, supersede, lru, gdsf, marconi };
constexpr const char* kPolicyNames[] = {"default", "supersede", "lru", "gdsf", "marconi"};
enum class Keep : std::uint8_t { all, prompt, nothing };
// Parts of the learned policy that can be switched off, to see what each is worth.
enum class Part : std::uint8_t { ghosts, flow, stages, gaps, horizon, forks };

struct Options {
  Paging paging;
  std::int64_t page_bytes = 0;
  std::int64_t slot_bytes = 0;
  std::int64_t num_slabs = 0;  // unified arena; 0 means the fixed one, of num_pages and num_slots
  std::int64_t num_pages = 0;
  std::int64_t num_slots = 0;
  std::int64_t max_cached_bytes = -1;    // -1: no cap
  std::int64_t alignment = 1;            // paid cuts fall on begin + alignment * k
  std::int64_t pass_cost = 512;          // tokens that one more forward pass is worth
  std::int64_t interior_spacing = 1024;  // tokens below which no sparse checkpoint is made
  std::int64_t run_ahead = 0;            // steps that may be launched before the one before is committed
  std::int64_t draft_tokens = 0;         // most drafts in a step
  bool inner_checkpoints = false;
  bool events = false;              // a journal of what joins and leaves the tree is kept
  std::int64_t event_capacity = 0;  // ids that it may hold; 0: what the arena holds
  std::int64_t small_part = 512;    // tokens: parts of an edge that have no more between them become one
  Policy policy = Policy::learned;
  std::uint32_t without = 0;       // learned: a bit for each Part that is switched off
  std::int64_t marconi_alpha = 0;  // weight of efficiency beside recency, in units of 2**-16

  bool has(Part part) const { return (without >> static_cast<int>(part) & 1) == 0; }
};

// What the token at a position stands for, where equal ids may have different content.
struct ContentKey {
  Position position;
  std::string content;
};

// A boundary that would have helped.
struct Missed {
  Position position = 0;
  Cause cause = Cause::never_made;
  std::optional<Kind> kind = {};  // of the checkpoint that stood there
  std::int64_t requests_ago = 0;  // admitted since it left, if one stood there
  std::int64_t time_ago = -1;     // the caller's, -1: not told
};

struct Match {
  Position length = 0;     // resumable: KV and a state at exactly this position
  Position kv_length = 0;  // how far the tree knows the tokens
  Reason reason = Reason::cold;
  std::int64_t ways = 0;  // with how many other tokens the tree goes on at kv_length; > 0: the prompt diverged
  std::optional<Missed> missed = {};
};

struct InnerCheckpoint {
  Position position;
  SlotId slot;
  Kind kind;
};

struct Step {
  Position begin = 0;  // the lowest, if that is not known yet
  Position end = 0;
  SlotId read_slot = kNone;
  SlotId write_slot = kNone;
  std::vector<InnerCheckpoint> checkpoints;
  // Of a verify step only:
  Position begin_max = 0;          // the highest begin
  std::vector<SlotId> candidates;  // what it reads if it begins at begin, begin + 1, .. begin_max
  std::vector<SlotId> rows;        // its own: the state after each of its last tokens
  bool verifies() const { return !rows.empty(); }
};

struct Copy {
  std::int32_t source;
  std::int32_t destination;
};

struct Plan {
  std::int64_t number = 0;
  std::vector<Copy> copy_slots;
  std::vector<SlotId> zero_slots;
  std::vector<Copy> copy_pages;
  std::vector<PageId> zero_pages;
};

// A call out of order: the caller's mistake about the life of a lease or a plan.
struct StateError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A second thread, or a callback, inside a call.
struct ConcurrencyError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The core found itself inconsistent. Nothing is to be done but stop.
struct InvariantError : std::logic_error {
  using std::logic_error::logic_error;
};

inline void ensure(bool holds, const char* what) {
  if (!holds) throw InvariantError(what);
}

inline std::string text(std::int64_t value) {
  return std::to_string(value);
}

// A caller's mistake.
[[noreturn]] inline void refuse(const std::string& what) {
  throw std::invalid_argument(what);
}

// Whether an id, or several of them or'ed, lies outside [0, 2**31). Below 0 they are the content table's.
template <class Integer>
bool is_no_id(Integer ids) {
  return (ids & ~Integer{INT32_MAX}) != 0;
}

// Names the first of `ids` that is none, which has index `first` + its place: there is one, unless somebody writes to
// them meanwhile.
template <class Integer>
[[noreturn]] void refuse_ids(std::span<const Integer> ids, const std::string& name, std::size_t first = 0) {
  const auto bad = std::find_if(ids.begin(), ids.end(), is_no_id<Integer>);
  if (bad == ids.end()) refuse(name + ": changed while they were read, expected that nobody writes to them");
  refuse(name + ": " + text(*bad) + " at index " + text(static_cast<std::int64_t>(first) + (bad - ids.begin())) +
         ", expected 0 <= token < 2**31");
}

inline void check_ids(std::span<const Token> ids, const std::string& name, std::size_t first = 0) {
  Token seen = 0;  // one vectorised pass; which one it was is looked up only for the message
  for (const Token id : ids) seen |= id;
  if (is_no_id(seen)) refuse_ids(ids, name, first);
}

// Written by the one thread inside the cache, read by any: no lock, no torn values.
class Counter {
 public:
  void add(std::int64_t n = 1) { value_.store(get() + n, std::memory_order_relaxed); }
  std::int64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::int64_t> value_{0};
};

// A running hash of every decision: equal calls give equal digests on every rank (I7).
class Digest {
 public:
  void mix(std::uint64_t event, std::uint64_t value) {
    state_ = (state_ ^ (event << 56) ^ value) * 0x9e3779b97f4a7c15ULL;
    state_ ^= state_ >> 29;
  }
  std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0x68796272696463ULL;
};

}  // namespace hybridcache
