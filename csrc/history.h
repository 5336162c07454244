// What became of boundaries, resident or not: a radix tree with a record at each boundary that was or could have been
// made, and wherever paths branched off. It owns the records and what was learned from them (hazard.h), and never sees
// a page or a slot.
//
//    salt -- [0, 10000) resident, flow 3 + 2          A record without a checkpoint is a ghost: its next use will
//                |    |                               fall to the nearest resident above, to which its index flows.
//              ghost  ghost
//              index 3  index 2
//
// A request ends the spell of the deepest boundary that it matches in full, resident or not: were a hit on a shallower
// one a use of that, what is kept would look useful for being kept.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "calendar.h"
#include "edge.h"
#include "hazard.h"
#include "types.h"

namespace hybridcache {

class ContentTable;
struct Node;

// What the caller said of a spell when its conversation paused.
enum class Hint : std::uint8_t { none, returns, silent };

// How the last checkpoint of a record left; nothing is decided by it.
struct Left {
  Cause cause = Cause::never_made;
  Kind kind{};
  std::int64_t request = 0;  // admitted until then
  std::int64_t time = -1;    // the caller's, -1: not told
};

struct Record {
  std::uint64_t id = 0;
  Record* parent = nullptr;           // null in a root
  const std::string* salt = nullptr;  // in a root
  Edge edge;  // from parent->depth to depth; none while `lent`: the end of its node's edge holds it
  bool lent = false;
  std::vector<std::pair<Token, Record*>> children;  // sorted by the first token of their edge
  Position depth = 0;
  Node* node = nullptr;  // whose checkpoint stands here; null: a ghost
  Left left;
  int pins = 0;  // leases that go on from here

  Kind kind = Kind::fork;
  std::int64_t uses = 0;
  std::int64_t turns = 0;  // of its conversation, as it was made
  std::int64_t gap = 0;    // mean of its last spells; before its first use, the one that its conversation has seen
  int priority = 0;        // of the request that made it, or came back to it last
  bool passed = false;     // a request has gone beyond it
  Hint hint = Hint::none;
  std::int64_t returns = 0;  // hint: when, in the caller's time
  std::int64_t opened = 0;   // when its spell began
  int bucket = 0;            // of its age
  Hazards::Class which{};
  Rate index = 0;
  Rate flow = 0;                       // of what is below, down to the next residents
  Rate given = 0;                      // to what is above: all of a ghost's, a share of a resident that may leave
  std::list<Record*>::iterator place;  // in the order of spells
  Calendar::Place due;                 // when its index is looked up again

  bool root() const { return parent == nullptr; }
  TokenRange tokens() const;  // of its edge
};

// Is told where the worth of a resident may have changed.
class HistoryWatcher {
 public:
  virtual ~HistoryWatcher() = default;
  virtual void worth_changed(Node& node) = 0;
};

// What a lease remembers of its path: the deepest record on it, and what its boundaries inherit.
struct Trail {
  Record* last = nullptr;  // pinned
  Position start = 0;      // where the request resumed
  Position left = 0;       // where it leaves all that is remembered, if others went on from there; else 0
  std::int64_t turns = 0;
  std::int64_t gap = 0;
  int priority = 0;
};

// What is known of a prompt that resumes at `start`, as far as it may resume: all but its last token.
struct Reach {
  Record* exit = nullptr;        // the deepest record that it matches in full; null: none, not even a root
  const Record* left = nullptr;  // of those beyond the start, the deepest that a checkpoint has left
  Position start = 0;
  Position known = 0;     // how far it is known, in all
  bool branches = false;  // it goes another way there
};

class History {
 public:
  // Remembers about `most_tokens` tokens of paths.
  History(const Options& options, std::int64_t most_tokens, ContentTable& contents)
      : options_(options), most_tokens_(most_tokens), contents_(contents), hazards_(options) {}
  ~History();
  History(const History&) = delete;
  void watch(HistoryWatcher* watcher) { watcher_ = watcher; }

  // Of a prompt that resumes at `start` (null: from nothing) and goes on with `rest`. One memcmp pass over what is
  // known.
  Reach reach(const std::string& salt, Record* start, std::span<const Token> rest) const;
  // The boundary whose checkpoint has left. REQUIRES: reach.left.
  Missed missed(const Reach& reach) const;
  // A request of such a prompt has come. Ends the spell of reach.exit, and begins its trail there.
  Trail arrived(const std::string& salt, const Reach& reach, int priority);
  // The record at `depth` of the path whose tokens from trail.start on are `path`; made if there is none.
  // REQUIRES: depth > trail.start.
  Record* at(Trail& trail, std::span<const Token> path, Position depth, Kind kind);
  // The trail of a fork, which goes on from `start`.
  Trail follow(const Trail& parent, Record* start);
  void leave(Trail& trail);

  // The caller's clock, in a unit of its choice; never goes back.
  void tell(std::int64_t time);
  // The conversation of this trail will be back in `units` of the caller's time. Of its boundaries the one of the kind
  // that followers use most will be asked for, the others will not.
  void expect(const Trail& trail, std::int64_t units);
  // It will not be back.
  void dismiss(const Trail& trail);

  void resident(Record* record, Node* node);
  void ghost(Record* record, Cause why);
  // The node of a resident is about to keep only what lies beyond `at`.
  void splitting(Record* record, Position at);
  void give(Record* record, Rate given);

  void each_edge(const std::function<void(TokenRange)>& visit) const;
  // Re-derives flows, edges and gauges; throws InvariantError. O(records + remembered tokens).
  void check() const;

 private:
  Record* root(const std::string& salt);
  Record* make(Record* parent, Edge edge, Kind kind, const Trail& trail, bool passed = false);
  Record* split(Record* record, Position depth, Kind kind, const Trail& trail);
  void open_spell(Record* record);
  void close_spell(Record* record);
  void passed(Record* record);
  void pass_time();
  void schedule(Record* record);
  void look_up(Record* record);
  Rate index_of(const Record& record);
  std::vector<Record*> made(const Trail& trail) const;
  void hint(Record* record, Hint hint);
  std::int64_t requests_until(std::int64_t time) const;
  void set_index(Record* record, Rate index);
  void flows_up(Record* from, Rate change);
  void add_child(Record* parent, Record* child);
  void remove_child(Record* child);
  void keep_edge(Record* record);
  void forget(Record* record);
  void forget_root(Record* root);
  void forget_oldest();

  static constexpr std::int64_t kGapUnit = Hazards::kGapUnit, kGapMemory = 7;
  static constexpr int kForgets = 64;  // records looked at for a new one
  const Options& options_;
  const std::int64_t most_tokens_;
  ContentTable& contents_;
  HistoryWatcher* watcher_ = nullptr;
  Hazards hazards_;
  std::map<std::string, Record*> roots_;
  Calendar calendar_;
  std::list<Record*> spells_;                                    // oldest first
  std::int64_t tokens_ = 0;                                      // of all edges
  std::int64_t now_ = 0;                                         // requests
  std::int64_t first_time_ = -1, time_ = 0, first_request_ = 0;  // the caller's clock, since it tells
  std::int64_t followed_[kKinds] = {};                           // boundaries of each kind that a follower came back to
  std::uint64_t next_id_ = 1;
};

}  // namespace hybridcache
