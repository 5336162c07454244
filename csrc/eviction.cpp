#include "eviction.h"

namespace hybridcache {

void Eviction::drop(Node& node) {
  auto& place = node.checkpoint->place;
  if (place.first == kNone) return;
  order_.erase(place);
  leaves_.erase(place);
  place.first = kNone;
}

void Eviction::changed(Node& node) {
  drop(node);
  auto& checkpoint = *node.checkpoint;
  if (checkpoint.pins > 0) return;
  checkpoint.place = {rank(checkpoint), checkpoint.tick};
  order_.emplace(checkpoint.place, &node);
  if (node.children.empty()) leaves_.emplace(checkpoint.place, &node);
}

Node* Eviction::lowest(int max_rank, bool leaf_first) const {
  for (const auto* order : {&leaves_, &order_}) {
    if (order == &leaves_ && !leaf_first) continue;
    if (!order->empty() && order->begin()->first.first <= max_rank) return order->begin()->second;
  }
  return nullptr;
}

void Eviction::evict(Node* node) {
  ensure(node->checkpoint && node->checkpoint->pins == 0, "eviction of a pinned checkpoint");
  evicted_[index(node->checkpoint->kind)].add();
  tree_.detach(node);
}

std::vector<Node*> Eviction::all() const {
  std::vector<Node*> nodes;
  for (const auto& [key, node] : order_) nodes.push_back(node);
  return nodes;
}

bool Eviction::places(const Node& node) const {
  const auto it = order_.find({rank(*node.checkpoint), node.checkpoint->tick});
  const bool in_order = it != order_.end() && it->second == &node;
  const bool in_leaves = leaves_.contains({rank(*node.checkpoint), node.checkpoint->tick});
  const bool unpinned = node.checkpoint->pins == 0;
  return in_order == unpinned && in_leaves == (unpinned && node.children.empty());
}

}  // namespace hybridcache
