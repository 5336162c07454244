// The cache: the only door to the core. It owns the arena, the tree and the leases, and carries out a request's life:
//
//   reserve -> [ launch -> collect -> applied -> commit ]* -> close
//   0 <= start <= committed <= computed <= capacity
//
// Every call first checks its arguments, then takes what can run out, then changes, then publishes. "No room" is a
// value without side effects; std::invalid_argument and StateError are the caller's mistakes, raised before anything
// changed; InvariantError is ours.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "admission.h"
#include "arena.h"
#include "eviction.h"
#include "history.h"
#include "journal.h"
#include "lease.h"
#include "placement.h"
#include "transcript.h"
#include "tree.h"

namespace hybridcache {

struct Prompt {
  std::span<const Token> tokens;  // checked by the cache, where the tree does not know them
  std::string salt;
  std::vector<ContentKey> content_keys;  // positions ascending
  Transcript* transcript = nullptr;      // whose tokens these are, with content ids
};

struct ReserveOptions {
  std::vector<Position> breakpoints;
  Position max_new_tokens = 0;
  std::int64_t now = -1;  // the caller's time, -1: not told
  int priority = 0;       // each one more doubles what the boundaries of this request are worth
};

struct Counters {
  Counter reserves, refused_reserves, launches, refused_launches, commits, closes, forks, extra_passes;
  Counter tokens_queried, tokens_hit, tokens_committed, dropped_checkpoints, duplicate_checkpoints;
  Counter published[kKinds], restored[kKinds], lost[kReasons], missed[kCauses];
  Counter open_leases, resting_leases, pins;
};

class Cache {
 public:
  static constexpr std::int64_t kDefaultRows = -1;
  static constexpr std::size_t kSpareLeases = 8;  // so many closed ones' tables are used again

  explicit Cache(const Options& options);

  // How far the prompt is known and how far it could resume, and what would have helped. Changes nothing (I9). One
  // memcmp pass over the tokens, and with a history one over what it remembers beyond the hit.
  Match match(const Prompt& prompt) const;

  // A lease on the prompt, all of its pages taken; nullopt: no room now. Throws if an empty arena could not hold it.
  std::optional<LeaseId> reserve(const Prompt& prompt, const ReserveOptions& options);

  // One step of at most counts[i] tokens for each lease; nullopt where there is no room. A caller's mistake refuses the
  // whole batch. rows[i] > 0: a verify step, which leaves as many states in slots of its own; rows may be empty, or
  // hold kDefaultRows: one for each token of a short decode step if there may be drafts. Valid until the next launch.
  std::span<const std::optional<Step>> launch(std::span<const LeaseId> leases, std::span<const Position> counts,
                                              std::span<const std::int64_t> rows);

  // What the launched steps need copied and zeroed. REQUIRES: at most run_ahead plans pending. It stays pending until
  // applied(), in order.
  Plan collect();
  void applied(std::int64_t plan);

  // The ids that each lease's oldest step has read beyond its prompt, lease after lease; counts[i] of them are lease
  // i's. Of a verify step's tokens those that stay. nullopt: as many as each step needs, which no verify step says.
  void commit(std::span<const LeaseId> leases, std::span<const Token> tokens,
              std::optional<std::span<const std::int64_t>> counts);

  // A breakpoint more: beyond what is launched, at the end of the last open step, or at a row of a verify step.
  void want(LeaseId lease, Position position);

  std::optional<LeaseId> fork(LeaseId lease);
  // `now`, `expected_return`: the caller's time, -1: not told.
  void close(LeaseId lease, Keep keep, bool discard, std::int64_t now = -1, std::int64_t expected_return = -1);

  // A session's tokens, kept here; see transcript.h. A prompt of one costs what is new since it was asked for last.
  TranscriptId open_transcript(const std::string& salt) { return transcripts_.open(salt); }
  void close_transcript(TranscriptId id) { transcripts_.close(id); }
  void extend(TranscriptId id, std::span<const Token> tokens, std::span<const ContentKey> keys);
  void truncate(TranscriptId id, Position length);
  const Transcript& transcript(TranscriptId id) const { return transcripts_.at(id); }
  std::vector<Token> plain_tokens(TranscriptId id) const { return transcripts_.plain_tokens(transcripts_.at(id)); }
  Prompt prompt(TranscriptId id) const;

  // Keeps the deepest checkpoint of the prompt, and with it the path, until released; nullopt if there is none.
  std::optional<PinId> pin(const Prompt& prompt);
  Position pinned_length(PinId pin) const;
  void release(PinId pin);
  // Drops every unpinned checkpoint, of one salt or of all; returns how many.
  std::int64_t clear(const std::optional<std::string>& salt);

  // What joined and left the tree since events were dropped last, if the options ask for events.
  const std::vector<Event>& events() { return journal_.events(); }
  void drop_events() { journal_.drop(); }

  // Re-derives the invariants in O(n); throws InvariantError with the tree printed.
  void check() const;
  std::string dump() const;
  std::uint64_t digest() const { return digest_.value(); }
  std::vector<std::pair<std::string, std::int64_t>> stats() const;

  const Options& options() const { return options_; }
  const Arena& arena() const { return arena_; }
  const Lease& lease(LeaseId id) const;

 private:
  friend class Checker;
  enum Call : std::uint64_t { kReserve = 32, kLaunch, kCommit, kClose, kFork, kApplied, kWant };

  // What a commit, a fork or a close is about to publish, with what that takes already in hand.
  struct Publication {
    std::vector<InnerCheckpoint> inner;  // ascending
    std::optional<Kind> kind;            // of the checkpoint at `committed`, if there is to be one
    SlotId state = kNone;                // the slot that becomes it
    bool gone_on = false;                // the lease has its next live slot already
    SlotId next = kNone;                 // else this is it, kNone at a close
  };

  bool keeps_history() const { return options_.policy == Policy::learned; }

  // match.cpp
  void check_prompt(const Prompt& prompt) const;
  void check_keys(std::span<const ContentKey> keys, Position first, Position end) const;
  std::span<const Token> symbols(const Prompt& prompt, std::vector<Token>& mapped) const;
  Walk walk(const Prompt& prompt, std::span<const Token> symbols, Position limit) const;
  Match to_match(const Walk& walk, Position length) const;
  std::optional<Missed> missed(const Match& match, Position length, const Reach& reach) const;

  // cache.cpp
  void check_breakpoints(const std::vector<Position>& breakpoints, Position last) const;
  void arrive(Lease& lease, const std::string& salt, const ReserveOptions& options);
  Lease& open_lease(LeaseId id);
  const std::vector<Lease*>& batch(std::span<const LeaseId> ids);  // each once
  std::unique_ptr<Lease> new_lease(Position pages, Position tokens);
  Lease& add_lease(std::unique_ptr<Lease> lease);
  std::optional<Node*> make_room_to_resume(const std::string& salt, Node* deepest, Position pages);
  void resume(Lease& lease, Node* node, Position pages, const Transcript* transcript = nullptr);
  void keep_tokens(Lease& lease, const Prompt& prompt);
  void take_pages(Lease& lease, Position pages);

  // steps.cpp
  void check_launch(const Lease& lease, Position count, std::int64_t rows) const;
  void check_commit(const Lease& lease) const;
  Position step_limit(const Lease& lease, Position count) const;
  std::optional<Step> launch_one(Lease& lease, Position count);
  bool make_room_for_pages(Lease& lease, Position pages);
  SlotId source(Lease& lease);
  std::optional<SlotId> optional_slot(Kind kind, bool spare);
  void acquire_inner(OpenStep& step, const std::vector<Wanted>& inner);
  void book(Lease& lease, OpenStep& step);
  const Step& open_step(Lease& lease, OpenStep&& step);
  void check_count(const Lease& lease, std::int64_t count) const;
  void commit_one(Lease& lease, std::span<const Token> tokens);
  void commit_ordinary(Lease& lease, const OpenStep& step, std::span<const Token> tokens);
  Publication to_publish(Lease& lease, const OpenStep& step);
  void publish(Lease& lease, const Publication& publication);
  Node* attach(Lease& lease, Node* node, Checkpoint checkpoint);
  void leave_behind(Lease& lease, SlotId slot);
  void release_read(Lease& lease);
  bool known_checkpoint(const Lease& lease, Position position) const;

  // close.cpp
  std::int64_t last_collected(const Lease& lease) const;
  bool may_still_run(std::int64_t plan) const;
  void end_rests();
  void let_go(Lease& lease);
  void trim_to_cap();
  std::int64_t cached_bytes() const;

  // verify.cpp
  std::int64_t rows_of(const Lease& lease, Position count, std::int64_t asked) const;
  void check_rows(const Lease& lease, Position count, std::int64_t rows) const;
  std::optional<Step> launch_verify(Lease& lease, Position count, std::int64_t rows);
  void commit_verify(Lease& lease, OpenStep step, std::span<const Token> tokens);
  Publication rows_to_publish(Lease& lease, OpenStep& step);
  void give_up_rows(Lease& lease, OpenStep& step, bool nothing_stays);

  const Paging& paging() const { return options_.paging; }

  const Options options_;
  Digest digest_;
  Arena arena_;
  ContentTable contents_;
  History history_;
  Tree tree_;
  Journal journal_;
  Eviction eviction_;
  Admission admission_;
  Placement placement_;
  mutable Transcripts transcripts_;                   // what they remember of the tree is no state of the cache (I9)
  std::map<LeaseId, std::unique_ptr<Lease>> leases_;  // open and resting
  std::vector<std::unique_ptr<Lease>> spare_leases_;  // closed ones, for the memory of their tables
  std::map<PinId, Node*> pins_;
  LeaseId next_lease_ = 1;
  PinId next_pin_ = 1;
  std::int64_t next_plan_ = 1;
  std::int64_t batch_ = 0;
  std::int64_t applied_ = 0;      // the number of the last applied plan
  std::vector<Plan> pending_;     // collected and not yet applied, oldest first
  std::int64_t open_steps_ = 0;   // of leases that are not closed
  std::vector<Lease*> launched_;  // since the last plan, in launch order
  Counters counters_;
  // Of the batch at hand, kept for their memory: a decode step allocates none.
  std::vector<Lease*> batch_leases_;
  std::vector<std::int64_t> batch_numbers_;  // launch: rows of each; commit: tokens of each
  std::vector<std::optional<Step>> batch_steps_;
};

}  // namespace hybridcache
