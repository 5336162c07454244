// Which checkpoint leaves first: one total order over the unpinned ones, by what they are worth, and the act of
// evicting. It pops the head, it never scans (but for `marconi`, whose scores are relative to all others').
//
//   lru         the least recently used
//   supersede   those that a later one serves instead, then the least recently used
//   gdsf        uses x tokens saved / bytes, on top of the worth of what left last
//   marconi     recency + alpha x tokens saved / bytes, both scaled to what is resident
//   learned     (index + flow of the ghosts below) x tokens saved / bytes: history.h
#pragma once

#include <functional>
#include <vector>

#include "heap.h"
#include "history.h"
#include "tree.h"
#include "types.h"

namespace hybridcache {

class Eviction : public CheckpointWatcher, public HistoryWatcher {
 public:
  static constexpr Worth kAny = UINT64_MAX;
  static constexpr Worth kNothing = 0;

  Eviction(const Options& options, Tree& tree, History& history);

  void joined(Node& node) override;
  void changed(Node& node) override { place(node); }
  void leaving(Node& node, Cause why) override;
  void left(Node& node) override { place_below(node); }
  void splitting(Node& node, Position at) override {
    if (node.checkpoint->record != nullptr) history_.splitting(node.checkpoint->record, at);
  }
  void worth_changed(Node& node) override;

  // The unpinned checkpoint that leaves first, worth less than `limit`; null if there is none. With `leaf_first`, those
  // whose node has no child go before all others: their KV leaves with them.
  Node* lowest(Worth limit, bool leaf_first) const;
  // What a boundary of this kind may replace: anything worth less.
  Worth limit(Kind kind) const;
  void evict(Node* node, Cause why);
  std::vector<Node*> all() const;  // in order
  // Visits the nodes that would leave if every unpinned checkpoint did, a node after those below it, until `visit` says
  // false. O(nodes visited + leaves that are pinned).
  void each_leaving(const std::function<bool(const Node&)>& visit) const;
  const Heap& order() const { return order_; }

  std::int64_t unpinned() const { return std::ssize(order_.entries()); }
  std::int64_t evicted(Kind kind) const { return evicted_[index(kind)].get(); }
  // check(): does the order hold `node` where it should?
  bool places(const Node& node) const;

 private:
  Worth worth(Node& node) const;
  std::uint64_t bytes(const Node& node) const;
  Worth density(const Node& node, std::uint64_t uses) const;
  Node* least_by_score() const;
  void place(Node& node);
  void share(Node& node, Worth worth);
  void drop(Node& node);
  void place_below(Node& node);

  const Options options_;
  Tree& tree_;
  History& history_;
  Heap order_{&Checkpoint::in_order};
  Heap leaves_{&Checkpoint::in_leaves};  // those of order_ whose node has no child
  Worth inflation_ = 0;                  // gdsf: the worth of what left last
  Worth price_ = 0;                      // learned: the worth of what left lately
  Counter evicted_[kKinds];
};

}  // namespace hybridcache
