// Which checkpoint leaves first: one total order over the unpinned ones, and the act of evicting. It pops the head, it
// never scans.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "tree.h"
#include "types.h"

namespace hybridcache {

class Eviction : public CheckpointWatcher {
 public:
  static constexpr int kAnyRank = 1;

  Eviction(Policy policy, Tree& tree) : policy_(policy), tree_(tree) { tree.watch(this); }

  void changed(Node& node) override;
  void leaving(Node& node) override { drop(node); }

  // The unpinned checkpoint that leaves first, of rank at most `max_rank`; null if there is none. With `leaf_first`,
  // those whose node has no child go before all others: their KV leaves with them.
  Node* lowest(int max_rank, bool leaf_first) const;
  void evict(Node* node);
  std::vector<Node*> all() const;  // in order

  std::int64_t unpinned() const { return static_cast<std::int64_t>(order_.size()); }
  std::int64_t evicted(Kind kind) const { return evicted_[index(kind)].get(); }
  int rank(const Checkpoint& checkpoint) const { return policy_ == Policy::standard && checkpoint.superseded ? 0 : 1; }
  // check(): does the order hold `node` where it should?
  bool places(const Node& node) const;

 private:
  using Key = std::pair<int, std::uint64_t>;  // (rank, tick): ticks are unique, so the order is total
  void drop(Node& node);

  const Policy policy_;
  Tree& tree_;
  std::map<Key, Node*> order_;
  std::map<Key, Node*> leaves_;  // those of order_ whose node has no child
  Counter evicted_[kKinds];
};

}  // namespace hybridcache
