#include "history.h"

#include <algorithm>
#include <utility>

#include "radix.h"
#include "tree.h"

namespace hybridcache {

History::~History() {
  for (Record* record : spells_) delete record;
  for (const auto& [salt, root] : roots_) delete root;
}

namespace {
Hazards::Class classify(const Record& record) {
  return Hazards::classify(record.kind, record.uses, record.passed, record.turns, record.gap);
}

Rate scaled(Rate index, int priority) {
  return priority < 0 ? index >> -priority : index << priority;
}
}  // namespace

Record* History::root(const std::string& salt) {
  const auto [it, inserted] = roots_.try_emplace(salt, nullptr);
  if (inserted) {
    it->second = new Record;
    it->second->salt = &it->first;
  }
  return it->second;
}

// ---------------------------------------------------------------- requests

Reach History::reach(const std::string& salt, Record* start, std::span<const Token> rest) const {
  Reach reach;
  const auto it = start == nullptr ? roots_.find(salt) : roots_.end();
  Record* exit = it == roots_.end() ? start : it->second;
  if (exit == nullptr) return reach;
  reach.start = reach.known = exit->depth;
  auto below = rest.first(rest.empty() ? 0 : rest.size() - 1);  // a hit leaves one token
  while (!below.empty()) {
    Record* next = child_at(exit->children, below.front());
    const auto common = next == nullptr ? 0 : common_prefix(next->tokens(), below);
    reach.known += static_cast<Position>(common);
    if (next == nullptr || reach.known < next->depth) {
      reach.branches = common > 0 ? common < below.size() : !exit->children.empty() && !exit->root();
      break;
    }
    exit = next;
    if (exit->left.cause != Cause::never_made) reach.left = exit;
    below = below.subspan(common);
  }
  reach.exit = exit;
  return reach;
}

Missed History::missed(const Reach& reach) const {
  const Left& left = reach.left->left;
  return {reach.left->depth, left.cause, left.kind, now_ - left.request, left.time < 0 ? -1 : time_ - left.time};
}

Trail History::arrived(const std::string& salt, const Reach& reach, int priority) {
  ++now_;
  pass_time();
  Record* exit = reach.exit == nullptr ? root(salt) : reach.exit;
  Trail trail;
  trail.start = reach.start;
  trail.priority = priority;
  if (reach.branches && options_.has(Part::forks)) trail.left = reach.known;
  trail.last = exit;
  ++exit->pins;
  while (!options_.has(Part::ghosts) && !exit->root() && exit->node == nullptr) exit = exit->parent;
  if (exit->root()) return trail;
  for (Record* above = exit->parent; !above->root() && !above->passed; above = above->parent) passed(above);
  trail.gap = kGapUnit * (now_ - exit->opened);
  trail.turns = exit->turns + 1;
  if (exit->uses == 0) ++followed_[index(exit->kind)];
  close_spell(exit);
  const auto seen = std::min(exit->uses, kGapMemory);
  exit->gap = (exit->gap * seen + trail.gap) / (seen + 1);
  ++exit->uses;
  exit->priority = priority;
  open_spell(exit);
  return trail;
}

Record* History::at(Trail& trail, std::span<const Token> path, Position depth, Kind kind) {
  Record* last = trail.last;
  while (!last->root() && last->parent->depth >= depth) last = last->parent;
  if (depth < last->depth) return split(last, depth, kind, trail);
  while (last->depth < depth) {
    const auto rest = path.subspan(last->depth - trail.start, depth - last->depth);
    Record* next = child_at(last->children, rest.front());
    const auto common = next == nullptr ? 0 : common_prefix(next->tokens(), rest);
    if (next == nullptr) {
      tokens_ += std::ssize(rest);
      contents_.acquire(rest);
      last = make(last, Edge(rest), kind, trail);
    } else if (last->depth + static_cast<Position>(common) == next->depth) {
      last = next;
    } else {  // others went on from here: that is worth a record, too
      last = split(next, last->depth + static_cast<Position>(common), common == rest.size() ? kind : Kind::fork, trail);
    }
  }
  if (last->depth > trail.last->depth) {
    --trail.last->pins;
    trail.last = last;
    ++last->pins;
  }
  ++last->pins;  // it may be a ghost above the trail's end
  forget_oldest();
  --last->pins;
  return last;
}

Record* History::make(Record* parent, Edge edge, Kind kind, const Trail& trail, bool passed) {
  auto* record = new Record;
  record->id = next_id_++;
  record->edge = std::move(edge);
  record->depth = parent->depth + static_cast<Position>(record->edge.size());
  record->kind = kind;
  record->passed = passed;
  record->turns = trail.turns;
  record->gap = trail.gap;
  record->priority = trail.priority;
  add_child(parent, record);
  record->place = spells_.insert(spells_.end(), record);
  record->due = calendar_.enter(record);
  open_spell(record);
  return record;
}

// The upper part becomes a new record, a ghost; `record` keeps its identity.
Record* History::split(Record* record, Position depth, Kind kind, const Trail& trail) {
  Record* parent = record->parent;
  const auto cut = static_cast<std::size_t>(depth - parent->depth);
  remove_child(record);
  Edge upper = record->lent ? Edge(record->tokens().first(cut)) : record->edge.take_front(cut, options_.small_part);
  Record* between = make(parent, std::move(upper), kind, trail, true);  // some go beyond it
  add_child(between, record);
  between->flow += record->given;
  between->given += record->given;
  return between;
}

Trail History::follow(const Trail& parent, Record* start) {
  Trail trail = parent;
  trail.last = start == nullptr ? parent.last : start;
  while (start == nullptr && !trail.last->root()) trail.last = trail.last->parent;
  trail.start = trail.last->depth;
  ++trail.last->pins;
  return trail;
}

void History::leave(Trail& trail) {
  Record* last = std::exchange(trail.last, nullptr);
  if (last == nullptr) return;
  --last->pins;
  if (last->root()) forget_root(last);
}

// ---------------------------------------------------------------- spells

void History::open_spell(Record* record) {
  record->opened = now_;
  record->bucket = 0;
  record->hint = Hint::none;
  record->which = classify(*record);
  spells_.splice(spells_.end(), spells_, record->place);
  hazards_.entered(record->which, 0);
  schedule(record);
  look_up(record);
}

void History::close_spell(Record* record) {
  hazards_.used(record->which, record->bucket);
}

// Its conversation has gone on: what it serves now are branches. The spell goes on in another class.
void History::passed(Record* record) {
  record->passed = true;
  if (record->uses > 0) return;
  const auto before = std::exchange(record->which, classify(*record));
  hazards_.moved(before, record->which, record->bucket);
  look_up(record);
}

// When a spell comes to the next age bucket, a resident also in between, and more often while a return is near.
void History::schedule(Record* record) {
  auto due = Calendar::kNever;
  if (record->hint == Hint::returns) due = now_ + std::max<std::int64_t>(1, requests_until(record->returns) / 8);
  if (record->bucket + 1 < Hazards::kBuckets) {
    const auto age = now_ - record->opened;
    const auto look = record->node == nullptr ? Hazards::first_age(record->bucket + 1)
                                              : hazards_.next_look(record->which, record->bucket, age, now_);
    due = std::min(due, record->opened + look);
  }
  calendar_.move(record->due, now_, due);
}

void History::pass_time() {
  while (Record* record = calendar_.due(now_)) {
    if (record->bucket + 1 < Hazards::kBuckets && now_ >= record->opened + Hazards::first_age(record->bucket + 1)) {
      hazards_.went_on(record->which, record->bucket++);
    }
    if (record->hint == Hint::returns && time_ > record->returns) record->hint = Hint::none;  // it did not
    schedule(record);
    look_up(record);
  }
}

void History::look_up(Record* record) {
  set_index(record, scaled(index_of(*record), record->priority));
}

Rate History::index_of(const Record& record) {
  switch (record.hint) {
    case Hint::silent:
      return 0;
    case Hint::returns:
      return (Rate{1} << kIndexBits) / static_cast<Rate>(requests_until(record.returns));
    case Hint::none:
      break;
  }
  if (record.node == nullptr && !options_.has(Part::ghosts)) return 0;
  return hazards_.index(record.which, record.bucket, now_ - record.opened, now_);
}

// ---------------------------------------------------------------- what the caller knows

void History::tell(std::int64_t time) {
  if (first_time_ < 0) {
    first_time_ = time;
    first_request_ = now_;
  }
  time_ = std::max(time_, time);
}

// At least 1, by the rate of requests so far.
std::int64_t History::requests_until(std::int64_t time) const {
  const auto units = std::max<std::int64_t>(time - time_, 0), elapsed = std::max<std::int64_t>(time_ - first_time_, 1);
  const auto wide = static_cast<__int128>(units) * std::max<std::int64_t>(now_ - first_request_, 1) / elapsed;
  return static_cast<std::int64_t>(std::clamp<__int128>(wide, 1, std::int64_t{1} << 30));
}

// The boundaries that this request has made, and nobody came back to yet.
std::vector<Record*> History::made(const Trail& trail) const {
  std::vector<Record*> made;
  for (Record* record = trail.last; !record->root() && record->depth > trail.start && record->uses == 0;)
    made.push_back(std::exchange(record, record->parent));
  return made;
}

void History::hint(Record* record, Hint hint) {
  record->hint = hint;
  schedule(record);
  look_up(record);
}

void History::expect(const Trail& trail, std::int64_t units) {
  const auto candidates = made(trail);
  const auto less = [this](const Record* a, const Record* b) {
    return followed_[index(a->kind)] < followed_[index(b->kind)];
  };
  const auto best = std::max_element(candidates.begin(), candidates.end(), less);  // the deepest of equals
  for (Record* record : candidates) {
    record->returns = time_ + units;
    hint(record, record == *best ? Hint::returns : Hint::silent);
  }
}

void History::dismiss(const Trail& trail) {
  for (Record* record : made(trail)) hint(record, Hint::silent);
}

void History::set_index(Record* record, Rate index) {
  const Rate change = index - record->index;  // modulo 2**64, as is the sum
  record->index = index;
  if (record->node != nullptr) {
    watcher_->worth_changed(*record->node);
  } else {
    record->given += change;
    flows_up(record, change);
  }
}

// To all above, as far as the nearest resident.
void History::flows_up(Record* from, Rate change) {
  if (change == 0) return;
  for (Record* above = from->parent; above != nullptr; above = above->parent) {
    above->flow += change;
    if (above->node == nullptr) {
      above->given += change;
      continue;
    }
    watcher_->worth_changed(*above->node);
    return;
  }
}

void History::resident(Record* record, Node* node) {
  record->node = node;
  record->lent = node->begin() <= record->parent->depth;
  if (record->lent) record->edge = Edge();
  if (!options_.has(Part::ghosts)) return open_spell(record);  // nothing is known of the time between
  schedule(record);
}

void History::give(Record* record, Rate given) {
  const Rate change = given - record->given;
  record->given = given;
  flows_up(record, change);
}

void History::ghost(Record* record, Cause why) {
  record->left = {why, record->node->checkpoint->kind, now_, first_time_ < 0 ? -1 : time_};
  keep_edge(record);
  record->node = nullptr;
  give(record, record->index + record->flow);
}

}  // namespace hybridcache
