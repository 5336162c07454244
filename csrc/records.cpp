// The tree of records: their tokens, who is whose child, and what is forgotten. What they learn is in history.cpp.
#include "history.h"

#include <utility>

#include "radix.h"
#include "tree.h"

namespace hybridcache {

TokenRange Record::tokens() const {
  return lent ? node->edge.last(depth - parent->depth) : edge.all();
}

void History::add_child(Record* parent, Record* child) {
  child->parent = parent;
  const auto first = child->tokens().front();
  parent->children.insert(child_position(parent->children, first), {first, child});
}

// The node that lends it will not hold all of it any more.
void History::keep_edge(Record* record) {
  if (!record->lent) return;
  record->edge = Edge(record->tokens());
  record->lent = false;
}

void History::splitting(Record* record, Position at) {
  if (record->parent->depth < at) keep_edge(record);
}

// REQUIRES: its edge still begins as it did when it was added.
void History::remove_child(Record* child) {
  auto& siblings = child->parent->children;
  siblings.erase(child_position(siblings, child->tokens().front()));
}

// REQUIRES: a ghost with at most one child, which goes on in its place.
void History::forget(Record* record) {
  calendar_.strike(record->due);
  flows_up(record, Rate{0} - record->index);
  Record* parent = record->parent;
  if (record->children.empty()) {
    remove_child(record);
    tokens_ -= static_cast<std::int64_t>(record->edge.size());
    contents_.release(record->edge.all());
  } else {
    Record* below = record->children.front().second;
    child_position(parent->children, record->tokens().front())->second = below;
    if (!below->lent || below->node->begin() > parent->depth) {
      keep_edge(below);
      record->edge.append(std::move(below->edge), options_.small_part);
      below->edge = std::move(record->edge);
    }
    below->parent = parent;
  }
  spells_.erase(record->place);
  delete record;
  if (parent->root()) forget_root(parent);
}

// Once nothing is remembered under its salt.
void History::forget_root(Record* root) {
  if (!root->children.empty() || root->pins > 0) return;
  roots_.erase(roots_.find(*root->salt));
  delete root;
}

void History::forget_oldest() {
  auto oldest = spells_.begin();
  for (int looks = 0; looks < kForgets && tokens_ > most_tokens_ && oldest != spells_.end(); ++looks) {
    Record* record = *oldest++;
    if (record->node == nullptr && record->pins == 0 && record->children.size() < 2) forget(record);
  }
}

// ---------------------------------------------------------------- check

void History::each_edge(const std::function<void(TokenRange)>& visit) const {
  for (const Record* record : spells_) visit(record->tokens());
}

void History::check() const {
  std::vector<const Record*> left;
  for (const auto& [salt, root] : roots_) {
    ensure(!root->children.empty() || root->pins > 0, "I1: an empty root of the history stays");
    left.push_back(root);
  }
  std::int64_t tokens = 0;
  std::size_t records = 0;
  while (!left.empty()) {
    const Record* record = left.back();
    left.pop_back();
    Rate flow = 0;
    for (const auto& [first, child] : record->children) {
      ensure(!child->lent || (child->node != nullptr && child->node->begin() <= record->depth && child->edge.empty()),
             "I7: a record's tokens are lent by a node that does not hold them");
      ensure(child->edge.is_right(options_.small_part), "I7: the tokens of a record are torn");
      ensure(child->parent == record && child->tokens().front() == first,
             "I7: a record is not where its first token says");
      ensure(child->depth == record->depth + std::ssize(child->tokens()), "I7: a record is not as deep as its path");
      flow += child->given;
      left.push_back(child);
    }
    ensure(flow == record->flow, "I7: what flows to a record is not what is given to it");
    if (record->root()) continue;
    ensure(record->node != nullptr || record->given == record->index + record->flow,
           "I7: a ghost keeps something back");
    ensure(record->left.request <= now_ && record->left.time <= time_, "I12: a checkpoint left at a time to come");
    ensure(*record->place == record, "I7: a record has the wrong place among the spells");
    tokens += std::ssize(record->tokens());
    ++records;
  }
  ensure(tokens == tokens_ && records == spells_.size(), "I7: records or their tokens are lost");
}

}  // namespace hybridcache
