// Drives the core (csrc/cache.h, no Python) through the calls that an input of bytes decodes to. It owns one cache and
// what its caller has to remember: the requests in flight, what they feed, pins, plans. After every call check() must
// be quiet, and a call that is refused, or only asks, must have changed nothing; else it throws what it found.
//
// The format, op by op, is described in tests/fuzz/replay.py, which replays the same input beside the oracle. The two
// decode alike: tests/test_fuzz.py compares the digests that they end at.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cache.h"

namespace fuzz {

using namespace hybridcache;

struct Finding : std::logic_error {
  using std::logic_error::logic_error;
};

// Past its end every byte is 0.
class Reader {
 public:
  explicit Reader(std::span<const std::uint8_t> input) : input_(input) {}
  bool more() const { return at_ < input_.size(); }
  int byte() { return more() ? input_[at_++] : 0; }

 private:
  std::span<const std::uint8_t> input_;
  std::size_t at_ = 0;
};

struct Setup {
  Options options;
  int vocabulary = 2;
  int finish = 0;
};
Setup read_setup(Reader& input);

struct Symbol {
  Token token;
  std::uint8_t content = 0;  // index into kContents, 0: none
  bool operator==(const Symbol&) const = default;
};

struct Path {
  std::string salt;
  std::vector<Symbol> symbols;
  bool operator==(const Path&) const = default;
};

// One open step: how many of its tokens stay is known to the device before any commit says so.
struct Running {
  std::vector<Token> feed;  // what it reads beyond the prompt
  Position rows = 0;
  Position stays = 0;    // of a verify step's tokens
  bool fails = false;    // too few stay: no row has their state
  bool is_void = false;  // the engine knows that nobody wants what it read
  bool must_be = false;  // void, as the cache knows, too: nothing stayed of the step before
  Position least() const { return static_cast<Position>(feed.size()) - rows + 1; }
};

struct Flight {
  LeaseId id;
  Path path;                  // its prompt, then what it committed
  std::deque<Running> steps;  // the oldest first
};

// An open transcript, and what it was told.
struct Session {
  TranscriptId id;
  Path path;
};

// A launch of one lease. The rows may be Cache::kDefaultRows.
struct Shape {
  Position count;
  std::int64_t rows;
};

// What must be as it was: digest, statistics and tree, but for one counter of refusals.
class Unchanged {
 public:
  explicit Unchanged(const Cache& cache) : digest_(cache.digest()), stats_(cache.stats()), dump_(cache.dump()) {}
  void verify(const Cache& cache, const std::string& what, const std::string& counter = "") const;

 private:
  std::uint64_t digest_;
  std::vector<std::pair<std::string, std::int64_t>> stats_;
  std::string dump_;
};

class Walk {
 public:
  explicit Walk(std::span<const std::uint8_t> input, bool trace = false);
  bool next();    // one op; false where the input ends
  void finish();  // the last calls, in the order that the input chooses; some of them may be left out
  void verify_nothing_is_left();
  const Cache& cache() const { return cache_; }

 private:
  using Op = void (Walk::*)();
  static const std::array<Op, 40> kOps;
  static constexpr std::size_t kMostFlights = 8;
  static constexpr std::size_t kRemembered = 12;  // paths that a prompt may be made of

  // walk.cpp: the ops
  void match();
  void reserve();
  void launch();
  void launch_batch();
  void want();
  void plan();
  void apply();
  void commit();
  void commit_batch();
  void turn();
  void overlap();
  void fork();
  void close();
  void pin();
  void release();
  void rare();
  void bad_call();      // bad_calls.cpp
  void open_session();  // sessions.cpp
  void extend_session();
  void truncate_session();
  void match_session();
  void reserve_session();
  void close_session();

  // sessions.cpp: their parts
  Session* session(int which);
  void tell(Session& session, const std::vector<Symbol>& more);
  void verify_tokens(const Session& session) const;

  // walk.cpp: their parts
  ReserveOptions reserve_options(Position length);
  void reserved(const Path& asked, const ReserveOptions& options,
                const std::function<std::optional<LeaseId>()>& reserve);
  void launch_all(const std::vector<std::size_t>& chosen, int size, int seed, int how);
  void launched(Flight& flight, const Step& step, int seed);
  void want_one(const Flight& flight, Position position);
  void commit_all(const std::vector<std::size_t>& chosen, int how);
  void verify_cursors(const Flight& flight) const;
  void collect();
  void apply_oldest();
  void apply_stale();
  void close_one(std::size_t index, Keep keep, bool discard);
  void close_all();
  void apply_all();
  void release_all();
  void clear(int which);
  void checked(const char* call);
  template <class Call>
  void refused(const char* what, Call call);

  // decode.cpp: operands
  Path path();
  std::vector<Symbol> fresh(std::int64_t length, int seed) const;
  Token token(std::int64_t index, int seed) const;
  Position count(const Flight& flight, int byte) const;
  std::int64_t rows(const Flight& flight, Position count, int how) const;
  Position position(const Flight& flight, int where) const;
  Position room() const;
  Position longest_prompt() const;
  bool fits(Position tokens) const;
  bool is_mistake(const Flight& flight, const Shape& shape) const;
  bool may_launch(const Flight& flight) const;
  bool would_launch(const Flight& flight) const;
  bool may_want(const Flight& flight, Position position) const;
  bool may_plan() const;
  bool may_commit(const Flight& flight) const;
  bool has_ended(const Flight& flight) const;
  bool may_fork(const Flight& flight) const;
  std::vector<std::size_t> those(bool (Walk::*may)(const Flight&) const) const;

  Reader input_;
  const Setup setup_;
  const bool trace_;
  Cache cache_;
  std::vector<Flight> flights_;
  std::vector<PinId> pins_;
  std::vector<Session> sessions_;
  std::vector<Path> paths_;           // those that prompts are made of, the newest last
  std::deque<std::int64_t> pending_;  // plans, the oldest first
  std::int64_t plans_ = 0;            // number of the last plan
  std::int64_t applied_ = 0;          // number of the last applied plan
  LeaseId closed_ = 0;                // the lease that was closed last
  TranscriptId closed_session_ = 0;   // and the transcript
};

// A prompt as the core takes it, and the tokens that it points to.
class Ask {
 public:
  explicit Ask(const Path& path);
  Ask(const Ask&) = delete;
  const Prompt& prompt() const { return prompt_; }

 private:
  std::vector<Token> tokens_;
  Prompt prompt_;
};

template <class Call>
void Walk::refused(const char* what, Call call) {
  const Unchanged before(cache_);
  bool thrown = false;
  try {
    call();
  } catch (const std::invalid_argument&) {
    thrown = true;
  } catch (const StateError&) {
    thrown = true;
  }
  if (!thrown) throw Finding(std::string(what) + ": accepted, expected a refusal");
  before.verify(cache_, what);
  checked(what);
}

}  // namespace fuzz
